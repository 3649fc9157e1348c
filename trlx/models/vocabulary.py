"""Whether a tokenizer and a model speak of the same tokens."""

from __future__ import annotations

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
