"""Loading a tokenizer with the special tokens that training needs."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trlx import logging

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
    cause = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        # where files are missing transformers may make one up that knows special tokens only
        special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        problem = None if tokenizer.get_vocab().keys() - special - {SPACE} else "it has no words"
    except Exception as error:  # of many kinds, TypeErrors among them
        problem, cause = f"{type(error).__name__}: {error}".partition("\n")[0], error
    if problem is not None:
        raise OSError(
            f"The tokenizer could not be loaded from {str(path)!r} ({problem}): write in tokenizer.tokenizer_path, "
            "which is model.model_path by default, the hub name or folder of the model's tokenizer, or an object"
        ) from cause
    return tokenizer


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text without a prompt is conditioned on: bos, or eos where there is no bos."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def shorten(tokens: list, length: int, side: str) -> list:
    """At most `length` items, the rest cut off on `side` ("left" or "right")."""
    return tokens[:length] if side == "right" else tokens[max(len(tokens) - length, 0) :]
