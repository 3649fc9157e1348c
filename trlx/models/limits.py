"""Checks that tokens and rows fit a model: the rows of its embeddings, and its positions."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlx import logging

logger = logging.get_logger(__name__)


def check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns if the tokenizer has more tokens than the model has embeddings, which are `vocab_size`.

    Raises:
        ValueError: a special token, which every batch needs, has no embedding.
    """
    advice = "take the tokenizer that belongs to the model, or resize_token_embeddings and save the model first"
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= vocab_size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has id {token}, but the model has embeddings for "
                f"{vocab_size} tokens only: {advice}"
            )
    if len(tokenizer) > vocab_size:
        logger.warning(f"The tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: {advice}")


def check_positions(model: PreTrainedModel, seq_length: int) -> int | None:
    """`check_length` for a model. Returns its number of positions if they are a table, else None."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    is_table = _has_table(model, positions)
    check_length(seq_length, positions, is_table)
    return positions if is_table else None


def check_length(seq_length: int, positions: int, is_table: bool) -> None:
    """Warns if rows may be longer than the `positions` of a model.

    Args:
        is_table: positions are a table (learned), which ends there; else they are computed (rotary).

    Raises:
        ValueError: the rows do not fit in a table.
    """
    if seq_length <= positions:
        return
    said = f"train.seq_length is {seq_length}, but the model has positions for {positions} tokens"
    if is_table:
        raise ValueError(f"{said}: write {positions} or less")
    logger.warning(f"{said}: it was not trained on longer rows, so its outputs there may be useless")


def _has_table(model: PreTrainedModel, positions: int) -> bool:
    words = model.get_input_embeddings().weight
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not words]
    # GPT-J has a table of sines and cosines
    tables += [buffer for name, buffer in model.named_buffers() if "pos" in name and buffer.dim() == 2]
    # OPT and BART have two more rows, for padding
    return any(positions <= len(table) <= positions + 2 for table in tables)
