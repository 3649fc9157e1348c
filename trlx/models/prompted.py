"""Architectures with PEFT's virtual tokens: learned embeddings before the prompt, or learned keys and values.

PEFT's own ``generate`` gives padding a position, so the response to a prompt would change beside a longer prompt. These
classes insert the virtual tokens themselves, in the same way for training and sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trlx.data.collate import left_pad
from trlx.models.architecture import Architecture, Causal, EncoderDecoder
from trlx.models.decoder import trunk


class PromptTuned(Causal):
    """Prompt tuning and p-tuning: learned embeddings stand before the tokens of a row."""

    def states(self, tokens: Tensor, *encoder: Tensor | None) -> Tensor:
        virtual, embedded = _embedded(self.adapter, tokens)
        return trunk(self.model)(inputs_embeds=torch.cat([virtual, embedded], 1), use_cache=False)[0][:, _count(self) :]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        # pad ids stand for the virtual tokens: first the padding, then the virtual tokens, then the prompt
        tokens, mask = left_pad([[pad_id] * _count(self) + prompt for prompt in prompts], pad_id)
        virtual, embedded = _embedded(self.adapter, tokens)
        at = tokens.shape[1] - mask.sum(1, keepdim=True) + torch.arange(_count(self))
        at = at[..., None].expand(virtual.shape).to(virtual.device)
        inputs = {"input_ids": tokens, "inputs_embeds": embedded.scatter(1, at, virtual), "attention_mask": mask}
        return inputs, tokens.shape[1]


class _Prefixed(Architecture):
    def recompute(self, selective: bool = False) -> None:
        raise ValueError(
            "Prefix tuning does not support train.gradient_checkpointing, which would drop the prefix: set it to "
            "false, or use prompt tuning or LoRA"
        )


class PrefixTuned(_Prefixed, Causal):
    """Prefix tuning: every block attends to learned keys and values before the tokens of a row.

    A sliding window counts padding too: in a sampler's batch a short prompt may lose the prefix a few tokens earlier.
    """

    def states(self, tokens: Tensor, *encoder: Tensor | None) -> Tensor:
        return trunk(self.model)(tokens, past_key_values=self.adapter.get_prompt(len(tokens)), use_cache=False)[0]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        tokens, mask = left_pad(prompts, pad_id)
        # for generate the learned keys and values are those of earlier tokens
        earlier = torch.full((len(prompts), _count(self)), pad_id)
        tokens, mask = torch.cat([earlier, tokens], 1), torch.cat([torch.ones_like(earlier), mask], 1)
        past = self.adapter.get_prompt(len(prompts))
        return {"input_ids": tokens, "attention_mask": mask, "past_key_values": past}, tokens.shape[1]


class PromptTunedEncoder(EncoderDecoder):
    """Prompt tuning and p-tuning: learned embeddings stand before the encoder's tokens."""

    def encoder_inputs(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        virtual, embedded = _embedded(self.adapter, tokens)
        mask = torch.cat([mask.new_ones(virtual.shape[:2]), mask], 1)
        return {"inputs_embeds": torch.cat([virtual, embedded], 1), "attention_mask": mask}


class PrefixTunedDecoder(_Prefixed, EncoderDecoder):
    """Prefix tuning: every block of the decoder attends to learned keys and values before its tokens."""

    def decoder_inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens, "past_key_values": self.adapter.get_prompt(len(tokens))}

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        inputs, _ = super().sampler_inputs(prompts, pad_id)
        # for generate the learned keys and values are those of earlier tokens
        starts = torch.full((len(prompts), _count(self) + 1), self.start_id)
        inputs |= {"decoder_input_ids": starts, "decoder_attention_mask": torch.ones_like(starts)}
        return inputs | {"past_key_values": self.adapter.get_prompt(len(prompts))}, starts.shape[1]


def _count(architecture: Architecture) -> int:
    return architecture.adapter.active_peft_config.num_virtual_tokens


def _embedded(adapter: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the virtual tokens [B, n, d], and of `tokens` [B, T, d]."""
    embeddings = adapter.word_embeddings
    embedded = embeddings(tokens.to(embeddings.weight.device))
    virtual = adapter.get_prompt(len(tokens))[:, : adapter.active_peft_config.num_virtual_tokens]
    return virtual.to(embedded.dtype), embedded
