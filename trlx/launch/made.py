"""A small random model, and data and a reward made in code: for trying things out, offline and in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, T5Config

from trlx.config import TRLConfig

QUICK = {"train.total_steps": 4, "train.eval_interval": 4, "train.tracker": None}
"""Settings with which the tiny model is trained, in seconds, where nobody says others."""

PROMPTS = ["My favourite animal is", "The sky is", "Two and two are", "I went home because"]
OUTPUTS = [(" a cat", " none"), (" blue", " made of cheese"), (" four", " seven"), (" it rained", " because")]
"""For each prompt a good output and a bad one."""


def rows(method: str) -> list[dict[str, Any]]:
    """What the method of a preset learns from: pairs, answers with a label, answers with a reward, or prompts."""
    both = [(prompt, *outputs) for prompt, outputs in zip(PROMPTS, OUTPUTS, strict=True)]
    if method in ("dpo", "reward"):
        return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in both]
    answers = [(row[0], row[1 + index], 1 - index) for row in both for index in (0, 1)]
    if method == "kto":
        return [{"prompt": prompt, "completion": output, "label": bool(good)} for prompt, output, good in answers]
    if method == "ilql":
        return [{"prompt": prompt, "output": output, "reward": float(good)} for prompt, output, good in answers]
    if method == "sft":
        return [{"prompt": prompt, "output": output} for prompt, output, good in answers if good]
    return [{"prompt": prompt} for prompt in PROMPTS]


def share_of_vowels(samples: Sequence[str], **kwargs: Any) -> list[float]:
    """A reward in [0, 1]."""
    return [sum(sample.count(vowel) for vowel in "aeiou") / max(len(sample), 1) for sample in samples]


def with_tiny_model(config: TRLConfig) -> TRLConfig:
    """`config`; if its model is "tiny", with a random one of that kind and a tokenizer of bytes in its place."""
    if config.model.model_path != "tiny":
        return config
    seq2seq = config.model.model_arch_type == "seq2seq"
    tokenizer = byte_tokenizer(ends_texts=seq2seq)
    return config.evolve(
        model={
            "model_path": tiny_t5(tokenizer) if seq2seq else tiny_gpt2(tokenizer),
            "num_layers_unfrozen": min(config.model.num_layers_unfrozen, 1),
        },
        tokenizer={"tokenizer_path": tokenizer},
    )


def byte_tokenizer(ends_texts: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; <pad> 0, <s> 1, </s> 2. With `ends_texts` it adds </s>, as T5's does."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    # byte-pair encoding without a single merge leaves bytes
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def tiny_gpt2(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A decoder of 66,528 parameters."""
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 1024}
    return GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)


def tiny_t5(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A small encoder-decoder."""
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, eos_token_id=2, pad_token_id=0, **shape)
