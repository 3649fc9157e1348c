"""Preferences as rollouts: pairs of answers to a prompt, of which one was chosen, and answers with a label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import takewhile
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.batch import Rollout
from trlx.data.chat import check_keys, is_chat
from trlx.data.dialogue import dialogues
from trlx.data.rows import PREFERENCES, as_list, check_columns, sample_list

logger = logging.get_logger(__name__)


def pairs(
    samples: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, special_tokens: bool = False
) -> list[Rollout]:
    """Tokenizes pairs of answers: rollout 2i is the chosen answer of row i, rollout 2i + 1 the rejected one.

    Args:
        samples: rows ``{"prompt", "chosen", "rejected"}``, or a data set with these columns; all texts or all chats
            (lists of messages). Without "prompt", the prompt is what both answers begin with: whole messages of chats,
            whole words of texts. A number "margin", which a row may have, becomes the score of its chosen rollout.

    Only answers are trained. Prompt and answer together are cut to `max_length` tokens as in `dialogues`. A pair of
    which one answer has no token left is dropped, with one warning for all. Another warning counts equal answers.

    Raises:
        ValueError, TypeError: there are no pairs, a row is none, or all pairs have equal answers.
    """
    rows = as_list(samples, "samples")
    columns = ("prompt", "chosen", "rejected")
    check_columns(rows, columns if rows and isinstance(rows[0], Mapping) and "prompt" in rows[0] else columns[1:])
    turns: list[Any] = []
    context: list[int] = []
    scores: list[float] = []
    for index, row in enumerate(rows):
        prompt, *answers = _parts(row, index)
        is_text = isinstance(prompt, str)
        turns += [[prompt, answer] if is_text else [*prompt, *answer] for answer in answers]
        context += [0 if is_text else len(prompt)] * 2
        scores += [_margin(row, index), 0.0]
    rollouts = dialogues(turns, tokenizer, max_length, scores, special_tokens, context, together=2)
    _report_equal(list(zip(rollouts[0::2], rollouts[1::2], strict=True)))
    return rollouts


def labelled(
    samples: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, special_tokens: bool = False
) -> list[Rollout]:
    """Tokenizes rows ``{"prompt", "completion", "label"}`` as `dialogues` does, but trains the completion alone.

    A rollout's score is 1 for the label True and 0 for False.

    Raises:
        ValueError, TypeError: there are no rows, or a row is not like that.
    """
    rows = as_list(samples, "samples")
    check_columns(rows, PREFERENCES["kto"])
    for index, row in enumerate(rows):
        if row["label"] not in (True, False):
            raise ValueError(f"Sample {index}: label must be True or False, got {row['label']!r}")
    context = [0 if isinstance(row["prompt"], str) else len(row["prompt"]) for row in rows]
    scores = [float(row["label"]) for row in rows]
    turns = sample_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    return dialogues(turns, tokenizer, max_length, scores, special_tokens, context)


def _parts(row: Mapping[str, Any], index: int) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), all texts or all lists of messages."""
    given = [row[name] for name in ("prompt", "chosen", "rejected") if name in row]
    if not (all(isinstance(part, str) for part in given) or all(map(is_chat, given))):
        kinds = f"{', '.join(type(part).__name__ for part in given)}"
        raise TypeError(
            f"Sample {index}: prompt, chosen and rejected must be texts, or lists of messages "
            f'{{"role": ..., "content": ...}}, and all of one kind; got {kinds}'
        )
    if "prompt" in row:
        return tuple(given)
    chosen, rejected = given
    shared = _shared_words(chosen, rejected) if isinstance(chosen, str) else _shared_messages(chosen, rejected)
    if not shared and not isinstance(chosen, str):
        for answer in given:
            check_keys(answer[0], f"Sample {index}, message 0")
        raise ValueError(f"Sample {index}: chosen and rejected begin with different messages: pass the prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _report_equal(both: list[tuple[Rollout, Rollout]]) -> None:
    equal = sum(chosen.response == rejected.response for chosen, rejected in both)
    said = (
        f"{equal} of {len(both)} pairs have two equal answers, or answers that differ only outside train.seq_length, "
        "so their comparison has no gradient: leave them out, or raise train.seq_length"
    )
    if equal == len(both):
        raise ValueError(said)
    if equal:
        logger.warning(said)


def _margin(row: Mapping[str, Any], index: int) -> float:
    margin = 0.0 if row.get("margin") is None else row["margin"]
    if not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise ValueError(f"Sample {index} has the margin {margin!r}: write a finite number, or leave it out")
    return float(margin)


def _shared_words(chosen: str, rejected: str) -> int:
    """The length of the common beginning, without a word that has begun; white space belongs to what follows it."""
    end = len(commonprefix([chosen, rejected]))
    while end and any(text[end:] and not text[end].isspace() for text in (chosen, rejected)):
        end -= 1
    return end


def _shared_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """The number of messages that both begin with; each keeps at least one of its own."""
    alike = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    return min(alike, len(chosen) - 1, len(rejected) - 1)
