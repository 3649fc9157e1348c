"""Texts, dialogues and chats to learn from (SFT, ILQL), as rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.batch import Rollout
from trlx.data.chat import chat_tokens, is_chat
from trlx.data.rows import sample_list
from trlx.data.tokenizer import beginning, begins_with, front, shorten

logger = logging.get_logger(__name__)


def dialogues(
    samples: Sequence[str | Sequence[str] | Sequence[Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    scores: Sequence[float] | None = None,
    special_tokens: bool = False,
    context: Sequence[int] | None = None,
    together: int = 1,
) -> list[Rollout]:
    """Tokenizes samples, or a data set with columns of them (see `sample_list`), to at most `max_length` tokens each.

    A text is one response. A list or tuple of texts alternates prompt, output, prompt, output ...: the tokens before
    the first output are the prompt of the rollout, all others its response, in which only outputs are trained. A list
    of messages is a chat (see `chat_tokens`). `front` stands before the first prompt; `beginning` is the prompt of a
    sample that begins with an output. One eos ends each sample; a chat may end with a token of its template instead.
    With `special_tokens`, for encoder-decoder models, prompts and outputs get all special tokens of the tokenizer. The
    first ``context[i]`` messages of chat i are not trained.

    Longer samples are cut on the tokenizer's truncation side, but keep a bos in front; samples of a block of `together`
    consecutive samples keep equal prompts. Samples that lose all output tokens are dropped, and with each all of its
    block. One warning counts the blocks that were cut, another those that were dropped. Raises a ValueError or
    TypeError if there are no samples, if one is none of these, or if all lose their output tokens.
    """
    samples = sample_list(samples)
    if not samples:
        raise ValueError("The list of samples is empty: pass at least one text, dialogue or chat")
    for index, sample in enumerate(samples):
        _check(index, sample)
    start, side, length = beginning(tokenizer), tokenizer.truncation_side, max_length
    rows = _tokenized(samples, tokenizer, special_tokens, context or [0] * len(samples), together)
    score = iter([0.0] * len(samples) if scores is None else scores)
    kept: list[Rollout] = []
    cut = 0
    for block in zip(*[rows] * together, strict=True):
        alike = _with_equal_prompts(block, start, side, length)
        rollouts = [_rollout(_cut(tokens, start, side, length), next(score)) for tokens in alike]
        if None not in rollouts:
            kept += rollouts
            cut += any(len(tokens) + len(start) * tokens[0][1] > length for tokens in block)
    total = len(samples) // together
    _report_dropped(total - len(kept) // together, total, max_length, together)
    if cut:
        logger.warning(
            f"{cut} of {total} samples are longer than train.seq_length ({max_length}) and were cut on the {side}"
        )
    return kept


def _check(index: int, sample: Any) -> None:
    if isinstance(sample, str) or is_chat(sample):
        return
    if not isinstance(sample, (list, tuple)) or not all(isinstance(text, str) for text in sample):
        kinds = 'a text, a list of texts [prompt, output, ...] or a list of messages {"role": ..., "content": ...}'
        raise TypeError(f"Sample {index} must be {kinds}, got {repr(sample)[:80]}")
    if not sample or len(sample) % 2:
        raise ValueError(f"Sample {index} has {len(sample)} texts, but a dialogue is pairs of prompt and output")


def _tokenized(
    samples: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: bool,
    context: Sequence[int],
    together: int,
) -> Iterator[list[tuple[int, bool]]]:
    """For each sample its tokens as pairs (id, whether it is an output's)."""
    dialogues = [("", sample) if isinstance(sample, str) else () if is_chat(sample) else sample for sample in samples]
    texts = [text for dialogue in dialogues for text in dialogue]
    ids = iter(tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"] if texts else [])
    in_front, alone = [] if special_tokens else front(tokenizer), beginning(tokenizer)
    for index, sample in enumerate(samples):
        if is_chat(sample):
            yield list(zip(*chat_tokens(sample, tokenizer, f"Sample {index // together}", context[index]), strict=True))
            continue
        turns = [next(ids) for _ in dialogues[index]]
        first = next((number for number, turn in enumerate(turns) if turn), 1)
        if first % 2:  # an output, which gets its prompt in `_cut`
            turns[first] = turns[first][begins_with(turns[first], alone) :]
        elif not begins_with(turns[first], in_front):
            turns[first] = [*in_front, *turns[first]]
        if turns[-1][-1:] != [tokenizer.eos_token_id]:
            turns[-1] = [*turns[-1], tokenizer.eos_token_id]
        yield [(token, number % 2 == 1) for number, turn in enumerate(turns) for token in turn]


def _with_equal_prompts(
    block: Sequence[list[tuple[int, bool]]], start: list[int], side: str, max_length: int
) -> list[list[tuple[int, bool]]]:
    """The samples of a block, their prompts cut to what the longest response leaves, if `side` is left."""
    if side == "right":
        return [*block]
    ends = [next((at for at, (_, is_output) in enumerate(tokens) if is_output), len(tokens)) for tokens in block]
    room = max_length - max(len(tokens) - end for tokens, end in zip(block, ends, strict=True))
    prompts = [tokens[:end] for tokens, end in zip(block, ends, strict=True)]
    kept = [begins_with([token for token, _ in prompt], start) for prompt in prompts]
    cut = [shorten(prompt, max(room, front), side, front) for prompt, front in zip(prompts, kept, strict=True)]
    return [prompt + tokens[end:] for prompt, tokens, end in zip(cut, block, ends, strict=True)]


def _cut(tokens: list[tuple[int, bool]], start: list[int], side: str, max_length: int) -> list[tuple[int, bool]]:
    """At most `max_length` of the pairs; where they begin with an output, `start` comes first."""
    tokens = shorten(tokens, max_length, side, kept=begins_with([token for token, _ in tokens], start))
    if not tokens[0][1]:
        return tokens
    return [(token, False) for token in start] + shorten(tokens, max(max_length - len(start), 0), side)


def _rollout(tokens: list[tuple[int, bool]], score: float) -> Rollout | None:
    """None: no token of an output is left."""
    ids, trained = zip(*tokens, strict=True)
    if True not in trained:
        return None
    first = trained.index(True)
    flags = None if all(trained[first:]) else list(trained[first:])
    return Rollout(prompt=list(ids[:first]), response=list(ids[first:]), score=score, trained=flags)


def _report_dropped(dropped: int, total: int, max_length: int, together: int) -> None:
    advice = "raise train.seq_length, or write left in tokenizer.truncation_side to cut the beginning instead"
    if dropped == total:
        raise ValueError(f"No sample has an output token within train.seq_length ({max_length}): {advice}")
    if dropped:
        whose = "their" if together == 1 else "one answer's"
        logger.warning(
            f"{dropped} of {total} samples were dropped, because none of {whose} output tokens lies within "
            f"train.seq_length ({max_length}): {advice}"
        )
