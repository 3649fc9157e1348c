"""Tiny random models of many architectures, and where each keeps its parts: written by hand, to check the search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB, LAYERS = 61, 3


@dataclass(frozen=True)
class Family:
    """One architecture: its config, the names of its blocks and final norm, and of its output head unless tied."""

    config: type
    sizes: dict
    blocks: str
    norm: str | None
    head: str | None = None


_PLAIN = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
_GROUPED = dict(_PLAIN, num_key_value_heads=2)
_SLIDING = dict(_GROUPED, head_dim=8, sliding_window=4)
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32)
_OPT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=32,
)
_FALCON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4)

FAMILIES = {
    "gpt2": Family(hf.GPT2Config, _GPT2, "transformer.h", "transformer.ln_f"),
    "gpt_neo": Family(
        hf.GPTNeoConfig,
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=LAYERS,
            num_heads=4,
            max_position_embeddings=32,
            window_size=4,
            attention_types=[[["global", "local", "global"], 1]],
        ),
        "transformer.h",
        "transformer.ln_f",
    ),
    "gpt_neox": Family(hf.GPTNeoXConfig, _PLAIN, "gpt_neox.layers", "gpt_neox.final_layer_norm", "lm_head"),
    "gptj": Family(hf.GPTJConfig, dict(_GPT2, rotary_dim=4), "transformer.h", "transformer.ln_f", "lm_head"),
    "gpt_bigcode": Family(hf.GPTBigCodeConfig, _GPT2, "transformer.h", "transformer.ln_f"),
    "opt": Family(
        hf.OPTConfig, dict(_OPT, word_embed_proj_dim=32), "model.decoder.layers", "model.decoder.final_layer_norm"
    ),
    "opt_projected": Family(
        hf.OPTConfig, dict(_OPT, word_embed_proj_dim=16, do_layer_norm_before=False), "model.decoder.layers", None
    ),
    "bloom": Family(
        hf.BloomConfig,
        dict(vocab_size=VOCAB, hidden_size=32, n_layer=LAYERS, n_head=4),
        "transformer.h",
        "transformer.ln_f",
    ),
    "falcon": Family(hf.FalconConfig, _FALCON, "transformer.h", "transformer.ln_f"),
    "falcon_alibi": Family(
        hf.FalconConfig,
        dict(_FALCON, alibi=True, parallel_attn=False, multi_query=False),
        "transformer.h",
        "transformer.ln_f",
    ),
    "mpt": Family(
        hf.MptConfig,
        dict(vocab_size=VOCAB, d_model=32, n_layers=LAYERS, n_heads=4, max_seq_len=32),
        "transformer.blocks",
        "transformer.norm_f",
    ),
    "llama": Family(hf.LlamaConfig, _GROUPED, "model.layers", "model.norm", "lm_head"),
    "qwen2": Family(hf.Qwen2Config, _GROUPED, "model.layers", "model.norm", "lm_head"),
    "qwen3": Family(hf.Qwen3Config, dict(_GROUPED, head_dim=8), "model.layers", "model.norm", "lm_head"),
    "mistral": Family(hf.MistralConfig, _SLIDING, "model.layers", "model.norm", "lm_head"),
    "mixtral": Family(hf.MixtralConfig, dict(_GROUPED, num_local_experts=4), "model.layers", "model.norm", "lm_head"),
    "gemma2": Family(hf.Gemma2Config, dict(_SLIDING, final_logit_softcapping=2.0), "model.layers", "model.norm"),
    "gemma3": Family(hf.Gemma3TextConfig, dict(_SLIDING, final_logit_softcapping=2.0), "model.layers", "model.norm"),
    "phi": Family(hf.PhiConfig, _PLAIN, "model.layers", "model.final_layernorm", "lm_head"),
    "stablelm": Family(hf.StableLmConfig, _GROUPED, "model.layers", "model.norm", "lm_head"),
    "olmo2": Family(hf.Olmo2Config, _GROUPED, "model.layers", "model.norm", "lm_head"),
    "cohere": Family(hf.CohereConfig, _GROUPED, "model.layers", "model.norm"),
    "granite": Family(hf.GraniteConfig, dict(_GROUPED, logits_scaling=8.0), "model.layers", "model.norm", "lm_head"),
    "mamba": Family(
        hf.MambaConfig,
        dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=LAYERS, state_size=4),
        "backbone.layers",
        "backbone.norm_f",
    ),
}


def tiny_config(name: str = "gpt2", **changes):
    """The config of a family's tiny model."""
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return FAMILIES[name].config(**{**special, **FAMILIES[name].sizes, **changes})


def tiny_model(name: str = "gpt2", seed: int = 0, **changes) -> PreTrainedModel:
    """A random model in evaluation mode, its weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    return model.eval()


@cache
def ragged_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and response mask [3, 9]; one token of the second response was not chosen by the model."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (3, 9), generator=generator)
    lengths, prompts = torch.tensor([9, 7, 4])[:, None], torch.tensor([3, 1, 2])[:, None]
    at = torch.arange(9)[None]
    response_mask = (at >= prompts) & (at < lengths)
    response_mask[1, 4] = False
    return tokens, at < lengths, response_mask
