"""Texts, dialogues and chats to learn from (SFT, ILQL), as rollouts that someone else has written."""

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
) -> list[Rollout]:
    """Tokenizes samples of at most `max_length` tokens each.

    A text is one response to what the tokenizer puts in front of texts, or else to bos (see `beginning`). A list or
    tuple alternates prompt, output, prompt, output ...; everything before the first output, with the same in front, is
    the prompt of the rollout, the rest its response, in which the later prompts are not trained. A list of messages,
    ``{"role": "user", "content": "Hi"}``, is a chat: the tokenizer's chat template writes it, and the assistant's turns
    are its outputs (see `chat_tokens`). One eos ends each sample, unless the chat template ends turns by a token of its
    own. What is too long is cut on the tokenizer's truncation side, except a bos in front; where that leaves an output
    at the very start, bos becomes its prompt.

    Args:
        samples: the samples, or a data set whose columns say what they are (see `sample_list`).
        scores: one per sample, for the rollouts made of them.
        special_tokens: let the tokenizer add what it adds by itself to prompts and outputs (encoder-decoder models).

    Samples of which no output token is left are dropped with one warning, so there may be fewer rollouts than samples.

    Raises:
        ValueError, TypeError: no samples, or one that is neither of the above (the message says which), or none with
            a token to learn from.
    """
    if isinstance(samples, str) or not len(samples):
        raise ValueError("samples must be a list of texts or dialogues, with at least one of them")
    samples = sample_list(samples)
    for index, sample in enumerate(samples):
        _check(index, sample)
    rollouts = []
    start = beginning(tokenizer)
    for index, (ids, trained) in enumerate(_tokenized(samples, tokenizer, special_tokens)):
        rollout = _rollout(ids, trained, tokenizer.truncation_side, max_length, start)
        if rollout is not None:
            rollout.score = 0.0 if scores is None else scores[index]
            rollouts.append(rollout)
    _report_dropped(len(samples) - len(rollouts), len(samples), max_length)
    return rollouts


def _check(index: int, sample: Any) -> None:
    if isinstance(sample, str) or is_chat(sample):
        return
    if not isinstance(sample, (list, tuple)) or not all(isinstance(text, str) for text in sample):
        raise TypeError(
            f"Sample {index} must be a text, a list of texts [prompt, output, ...] or a list of messages "
            f'{{"role": ..., "content": ...}}, got {repr(sample)[:80]}'
        )
    if not sample or len(sample) % 2:
        raise ValueError(
            f"Sample {index} has {len(sample)} messages, but a dialogue alternates prompt, output, ... "
            "and ends with an output"
        )


def _tokenized(
    samples: list[Any], tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """The token ids of each sample, and which of them are an output's."""
    before = [] if special_tokens else front(tokenizer)
    alone = beginning(tokenizer)
    turns = [("", sample) if isinstance(sample, str) else () if is_chat(sample) else sample for sample in samples]
    texts = [text for turn in turns for text in turn]
    ids = iter(tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"] if texts else [])
    for index, sample in enumerate(samples):
        if is_chat(sample):
            yield chat_tokens(sample, tokenizer, f"Sample {index}")
            continue
        messages = _begun([next(ids) for _ in turns[index]], before, alone)
        if messages[-1][-1:] != [tokenizer.eos_token_id]:
            messages[-1] = [*messages[-1], tokenizer.eos_token_id]
        yield (
            [token for message in messages for token in message],
            [i % 2 == 1 for i, message in enumerate(messages) for _ in message],
        )


def _begun(messages: list[list[int]], before: list[int], alone: list[int]) -> list[list[int]]:
    """The messages, with `before` at the beginning of the first, or `alone` where that is an output; once, also where
    the message brings it along."""
    first = next((index for index, message in enumerate(messages) if message), 1)
    said = messages[first]
    if first % 2:
        messages[0], messages[first] = alone, said[begins_with(said, alone) :]
    elif not begins_with(said, before):
        messages[first] = [*before, *said]
    return messages


def _rollout(ids: list[int], trained: list[bool], side: str, max_length: int, start: list[int]) -> Rollout | None:
    """One sample, an output being where `trained` is True; None where no token of an output is left."""
    kept = begins_with(ids, start)
    ids, trained = shorten(ids, max_length, side, kept), shorten(trained, max_length, side, kept)
    if trained and trained[0]:
        room = max(max_length - len(start), 0)
        ids, trained = start + shorten(ids, room, side), [False] * len(start) + shorten(trained, room, side)
    if True not in trained:
        return None
    first = trained.index(True)
    flags = trained[first:]
    return Rollout(prompt=ids[:first], response=ids[first:], trained=None if all(flags) else flags)


def _report_dropped(dropped: int, total: int, max_length: int) -> None:
    advice = "raise train.seq_length, or write left in tokenizer.truncation_side, which cuts the beginning instead"
    if dropped == total:
        raise ValueError(f"No sample has an output token within train.seq_length ({max_length}): {advice}")
    if dropped:
        logger.warning(
            f"{dropped} of {total} samples were dropped: within train.seq_length ({max_length} tokens) nothing of "
            f"their outputs is left to learn from; {advice}"
        )
