"""Small tokenizers and models made in code. Plain functions, so that spawned processes can build the same ones."""

from __future__ import annotations

import string
import tarfile
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trlx.sampling.base import Sampler
from trlx.sampling.decode import DecodingSampler

UNPACK = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""How to unpack an archive; Python knows the argument from 3.11.4 on."""
CHARACTERS = string.ascii_lowercase + " .,:!?#\n"


def char_tokenizer(
    *,
    bos: bool = True,
    eos: bool = True,
    pad: bool = True,
    pad_is_eos: bool = False,
    adds_bos: bool = False,
    adds_eos: bool = False,
    characters: str = CHARACTERS,
) -> PreTrainedTokenizerFast:
    """One token per character of `characters`; decoding gives back the plain text.

    Ids: <pad> 0, <s> 1, </s> 2, <unk> 3, "a" 4, "b" 5, ... whichever special tokens are declared. `adds_bos` puts <s>
    in front of every text, as Llama's tokenizer does, `adds_eos` </s> behind it, where special tokens are asked for.
    """
    ids = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos or adds_eos:
        single = f"{'<s> ' * adds_bos}$A{' </s>' * adds_eos}"
        tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {
        "bos_token": "<s>" if bos else None,
        "eos_token": "</s>" if eos else None,
        "pad_token": "</s>" if pad_is_eos else "<pad>" if pad else None,
    }
    named = {name: token for name, token in special.items() if token is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False, **named
    )


VOCABULARY = len(CHARACTERS) + 4
"""Number of tokens of `char_tokenizer`."""


def tiny_gpt2_config(vocab_size: int = VOCABULARY, layers: int = 2, hidden: int = 32, **changes: Any) -> GPT2Config:
    """A GPT-2 of a few thousand parameters, its special tokens those of `char_tokenizer`, without dropout."""
    settings = {
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    return GPT2Config(vocab_size=vocab_size, n_layer=layers, n_embd=hidden, **{**settings, **changes})


def tiny_gpt2(
    vocab_size: int = VOCABULARY, layers: int = 2, hidden: int = 32, seed: int = 0, **changes: Any
) -> GPT2LMHeadModel:
    """`tiny_gpt2_config` with weights that depend on `seed` alone, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(tiny_gpt2_config(vocab_size, layers, hidden, **changes)).eval()


def responses(sampler, prompts, sampling) -> list[list[int]]:
    """The token ids that a sampler, or that of a policy, draws."""
    sampler = sampler if isinstance(sampler, Sampler) else DecodingSampler(sampler, "cpu")
    return [sample.ids for sample in sampler.generate(prompts, sampling)]
