"""Loading a tokenizer with the special tokens that training needs."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trlx import logging
from trlx.data.hub import check_folder, first_line

logger = logging.get_logger(__name__)


def load_tokenizer(
    path: str | PreTrainedTokenizerBase,
    *,
    padding_side: str = "left",
    truncation_side: str = "right",
    extra: dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder, or a copy of a tokenizer object. If it has no pad token, eos becomes that.

    `extra` are further keyword arguments of ``from_pretrained``, e.g. ``{"eos_token": "</s>"}``. Raises an OSError if
    there is no tokenizer at `path`, and a ValueError if it has no eos token or if an object is given with `extra`.
    """
    given = isinstance(path, PreTrainedTokenizerBase)
    if given and extra:
        raise ValueError("tokenizer.tokenizer_extra_configs is for loading from a path; set them on your tokenizer")
    tokenizer = copy.deepcopy(path) if given else read_tokenizer(path, **(extra or {}))
    tokenizer.padding_side, tokenizer.truncation_side = padding_side, truncation_side
    if tokenizer.eos_token_id is None:
        where = "tokenizer.tokenizer_extra_configs.eos_token, or set it on the tokenizer object"
        raise ValueError(f"The tokenizer has no eos token, so no response could end: name one of its tokens in {where}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f"The tokenizer has no pad token; padding with its eos token {tokenizer.eos_token!r}")
    return tokenizer


def read_tokenizer(path: str, **how: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at `path` as its files describe it; raises an OSError if there is none."""
    check_folder(str(path), "tokenizer.tokenizer_path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        # if files are missing, transformers may return a tokenizer that knows only special tokens
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        has_words = tokenizer.get_vocab().keys() - special - {"\u2581"}  # which sentencepiece writes for a space
        problem = None if has_words else "it has no words"
    except Exception as error:  # of many kinds, TypeErrors among them
        problem = first_line(error)
    if problem is not None:
        raise OSError(
            f"The tokenizer could not be loaded from {str(path)!r} ({problem}): write in tokenizer.tokenizer_path, "
            "which is model.model_path by default, the hub name or folder of the model's tokenizer, or an object"
        )
    return tokenizer


def front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that the tokenizer puts before every text: bos for Llama and Gemma, none for GPT-2."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids before a response that has no prompt: `front`; if that is empty bos; if there is no bos, eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return front(tokenizer) or [eos if bos is None else bos]


def prompt_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of prompts. Each begins with `front` once, even if the text brings it along; nothing is appended.

    With `special_tokens`, as encoders need it, they have all special tokens that the tokenizer adds.
    """
    ids = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"] if texts else []
    start = [] if special_tokens else front(tokenizer)
    return [row if begins_with(row, start) else [*start, *row] for row in ids]


def shorten(tokens: list, length: int, side: str, kept: int = 0) -> list:
    """At most `length` items. The rest is cut off on `side` ("left" or "right"), but never from the first `kept`."""
    if side == "right" or len(tokens) <= length:
        return tokens[:length]
    kept = min(kept, length)
    return [*tokens[:kept], *tokens[len(tokens) - length + kept :]]


def begins_with(tokens: list[int], start: list[int]) -> int:
    """``len(start)`` if `tokens` begins with `start`, else 0."""
    return len(start) if tokens[: len(start)] == start else 0
