"""A tokenizer of single letters, made in code: nothing is downloaded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def letter_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """Maps letter number i to token id i; bos, eos and pad follow. ``save_pretrained`` puts it beside a model."""
    vocab = {token: token_id for token_id, token in enumerate([*letters, BOS, EOS, PAD])}
    # byte-pair encoding without a single merge leaves characters
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
