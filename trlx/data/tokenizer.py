"""Loading a tokenizer with the special tokens that training needs."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trlx import logging
from trlx.data.hub import check_folder, first_line

logger = logging.get_logger(__name__)

SPACE = "\u2581"
"""How sentencepiece writes a space."""


def load_tokenizer(
    path: str | PreTrainedTokenizerBase,
    *,
    padding_side: str = "left",
    truncation_side: str = "right",
    extra: dict[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer with an eos and a pad token; where pad is missing, eos stands in for it.

    Args:
        path: hub name, folder, or a tokenizer object, which is copied and never changed.
        extra: further keyword arguments of ``from_pretrained``, e.g. ``{"eos_token": "</s>"}``.

    Raises:
        OSError: there is no tokenizer at `path`.
        ValueError: there is no eos token, or `extra` is given along with a tokenizer object.
    """
    if isinstance(path, PreTrainedTokenizerBase):
        if extra:
            raise ValueError("tokenizer.tokenizer_extra_configs is for loading from a path; set them on your tokenizer")
        tokenizer = copy.deepcopy(path)
    else:
        tokenizer = read_tokenizer(path, **(extra or {}))
    tokenizer.padding_side, tokenizer.truncation_side = padding_side, truncation_side
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos token, so a response could never end. Name one of its tokens in "
            "tokenizer.tokenizer_extra_configs.eos_token (or set it on the tokenizer object)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(f"The tokenizer has no pad token; padding with its eos token {tokenizer.eos_token!r}")
    return tokenizer


def read_tokenizer(path: str, **how: Any) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, as its files say.

    Raises:
        OSError: there is none.
    """
    check_folder(str(path), "tokenizer.tokenizer_path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        # where files are missing transformers may make one up that knows special tokens only
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        problem = None if tokenizer.get_vocab().keys() - special - {SPACE} else "it has no words"
    except Exception as error:  # of many kinds, TypeErrors among them
        problem = first_line(error)
    if problem is not None:
        raise OSError(
            f"The tokenizer could not be loaded from {str(path)!r} ({problem}): write in tokenizer.tokenizer_path, "
            "which is model.model_path by default, the hub name or folder of the model's tokenizer, or an object"
        )
    return tokenizer


def front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: bos for Llama and Gemma, nothing for GPT-2."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a response without a prompt follows, as it must follow something: `front`; where that is nothing bos, and
    where there is none eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return front(tokenizer) or [eos if bos is None else bos]


def prompt_tokens(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of texts that a response follows in the same row.

    In front of each stands what the tokenizer puts there, once, also where the text brings it along. What it appends
    (an eos) is left out.

    Args:
        special_tokens: both are wanted, as by an encoder, which reads whole texts (see ``RowFormat.special_tokens``).
    """
    ids = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"] if texts else []
    start = [] if special_tokens else front(tokenizer)
    return [row if begins_with(row, start) else [*start, *row] for row in ids]


def shorten(tokens: list, length: int, side: str, kept: int = 0) -> list:
    """At most `length` items, the rest cut off on `side` ("left" or "right") behind the first `kept`."""
    if side == "right" or len(tokens) <= length:
        return tokens[:length]
    kept = min(kept, length)
    return [*tokens[:kept], *tokens[len(tokens) - length + kept :]]


def begins_with(tokens: list[int], start: list[int]) -> int:
    """How many of the first tokens are `start`: all or none of it."""
    return len(start) if tokens[: len(start)] == start else 0
