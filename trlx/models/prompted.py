"""Models with virtual tokens: learned embeddings in front of the prompt, or learned keys and values (PEFT).

PEFT's own ``generate`` counts padding as positions, so a prompt would be answered differently beside a longer one. Here
virtual tokens are put in place directly, in training and in sampling alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trlx.data.collate import left_pad
from trlx.models.architecture import Causal, EncoderDecoder
from trlx.models.decoder import trunk


class PromptTuned(Causal):
    """Prompt tuning, p-tuning: the decoder reads learned embeddings before the tokens of a row."""

    def states(
        self, tokens: Tensor, encoder_tokens: Tensor | None = None, encoder_mask: Tensor | None = None
    ) -> Tensor:
        virtual, embedded = _embedded(self.adapter, tokens)
        return trunk(self.model)(inputs_embeds=torch.cat([virtual, embedded], 1), use_cache=False)[0][:, _count(self) :]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        # ids of padding hold the place of virtual tokens, behind the padding in front of a row
        tokens, mask = left_pad([[pad_id] * _count(self) + prompt for prompt in prompts], pad_id)
        virtual, embedded = _embedded(self.adapter, tokens)
        at = tokens.shape[1] - mask.sum(1, keepdim=True) + torch.arange(_count(self))
        at = at[..., None].expand(virtual.shape).to(virtual.device)
        inputs = {"input_ids": tokens, "inputs_embeds": embedded.scatter(1, at, virtual), "attention_mask": mask}
        return inputs, tokens.shape[1]


class PrefixTuned(Causal):
    """Prefix tuning: in every block the decoder attends to learned keys and values before the tokens of a row.

    Where attention has a sliding window, padding in a sampler's batch counts in it: a prompt that comes close to the
    window loses sight of the prefix a little earlier beside a longer one.
    """

    def states(
        self, tokens: Tensor, encoder_tokens: Tensor | None = None, encoder_mask: Tensor | None = None
    ) -> Tensor:
        return trunk(self.model)(tokens, past_key_values=self.adapter.get_prompt(len(tokens)), use_cache=False)[0]

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        tokens, mask = left_pad(prompts, pad_id)
        # to generate, learned keys and values are those of tokens read before
        read = torch.full((len(prompts), _count(self)), pad_id)
        inputs = {
            "input_ids": torch.cat([read, tokens], 1),
            "attention_mask": torch.cat([torch.ones_like(read), mask], 1),
            "past_key_values": self.adapter.get_prompt(len(prompts)),
        }
        return inputs, inputs["input_ids"].shape[1]

    def recompute(self) -> None:
        raise _no_recomputing()


class PromptTunedEncoder(EncoderDecoder):
    """Prompt tuning, p-tuning: the encoder reads learned embeddings before the prompt."""

    def encoder_inputs(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        virtual, embedded = _embedded(self.adapter, tokens)
        mask = torch.cat([mask.new_ones(virtual.shape[:2]), mask], 1)
        return {"inputs_embeds": torch.cat([virtual, embedded], 1), "attention_mask": mask}


class PrefixTunedDecoder(EncoderDecoder):
    """Prefix tuning: in every block the decoder attends to learned keys and values before the response."""

    def decoder_inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens, "past_key_values": self.adapter.get_prompt(len(tokens))}

    def sampler_inputs(self, prompts: list[list[int]], pad_id: int) -> tuple[dict[str, Any], int]:
        inputs, _ = super().sampler_inputs(prompts, pad_id)
        # to generate, learned keys and values are those of tokens read before
        starts = torch.full((len(prompts), _count(self) + 1), self.start_id)
        inputs |= {"decoder_input_ids": starts, "decoder_attention_mask": torch.ones_like(starts)}
        return inputs | {"past_key_values": self.adapter.get_prompt(len(prompts))}, starts.shape[1]

    def recompute(self) -> None:
        raise _no_recomputing()


def _count(architecture: Causal | EncoderDecoder) -> int:
    return architecture.adapter.active_peft_config.num_virtual_tokens


def _embedded(adapter: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the virtual tokens [B, n, d] and of `tokens` [B, T], which are [B, T, d]."""
    embeddings = adapter.word_embeddings
    embedded = embeddings(tokens.to(embeddings.weight.device))
    virtual = adapter.get_prompt(len(tokens))[:, : adapter.active_peft_config.num_virtual_tokens]
    return virtual.to(embedded.dtype), embedded


def _no_recomputing() -> ValueError:
    return ValueError(
        "Prefix tuning does not go together with train.gradient_checkpointing, which would drop the prefix: set it to "
        "false, or use prompt tuning or LoRA"
    )
