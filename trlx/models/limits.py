"""What a model has room for: tokens of its vocabulary, and positions in a row."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trlx import logging

logger = logging.get_logger(__name__)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`check_vocabulary_size` of a model."""
    check_vocabulary_size(model.get_input_embeddings().weight.shape[0], tokenizer)


def check_vocabulary_size(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where the tokenizer knows tokens that a model of `rows` embeddings has none for.

    Raises:
        ValueError: one of them is a special token, which every batch needs.
    """
    advice = "take the tokenizer that belongs to the model, or resize_token_embeddings and save the model first"
    for name in ("bos_token", "eos_token", "pad_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= rows:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} has id {token}, but the model has embeddings for "
                f"{rows} tokens only: {advice}"
            )
    if len(tokenizer) > rows:
        logger.warning(f"The tokenizer knows {len(tokenizer)} tokens, the model {rows}: {advice}")


def check_positions(model: PreTrainedModel, seq_length: int) -> int | None:
    """`check_length` of a model. Returns how many positions it has, where they are a table."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    is_table = _has_table(model, positions)
    check_length(seq_length, positions, is_table)
    return positions if is_table else None


def check_length(seq_length: int, positions: int, is_table: bool) -> None:
    """Warns where rows may be longer than the `positions` that a model was made for.

    Args:
        is_table: there is nothing for the positions behind (a learned table); else they are computed (rotary).

    Raises:
        ValueError: the rows do not fit in a table.
    """
    if seq_length <= positions:
        return
    said = f"train.seq_length is {seq_length}, but the model has positions for {positions} tokens"
    if is_table:
        raise ValueError(f"{said}: write {positions} or less")
    logger.warning(f"{said}: it has never seen what lies behind, and may not make sense there")


def _has_table(model: PreTrainedModel, positions: int) -> bool:
    words = model.get_input_embeddings().weight
    modules = (module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is not words)
    # GPT-J's sines and cosines are a table, too
    buffers = (buffer for name, buffer in model.named_buffers() if "pos" in name and buffer.dim() == 2)
    rows = [module.num_embeddings for module in modules] + [len(buffer) for buffer in buffers]
    # OPT and BART keep two rows for padding
    return any(positions <= count <= positions + 2 for count in rows)
