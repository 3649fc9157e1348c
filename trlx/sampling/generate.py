"""Sampling from a Hugging Face model with transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from trlx.models.policy import Policy
from trlx.sampling.rules import shaping
from trlx.sampling.settings import SHAPING, SamplingConfig, check_logits, cut_at_eos

KEPT_SETTINGS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What a model's own generation settings may still decide; they say how its sequences are built, not how to sample."""


@torch.no_grad()
def generate(policy: Policy, prompts: list[list[int]], sampling: SamplingConfig, device) -> list[list[int]]:
    """One response per prompt: ids as sampled, up to and including the first eos.

    Raises:
        FloatingPointError: see `check_logits`.
    """
    if not prompts:
        return []
    shape = {name: sampling.extra[name] for name in SHAPING if name in sampling.extra}
    inputs, width = policy.architecture.sampler_inputs(prompts, sampling.pad_token_id)
    criteria = [sampling.stop.criteria(width)] if sampling.stop else []
    with _plain_settings(policy.model), shaping(policy, **shape) as processors:
        sequences = policy.model.generate(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
            generation_config=generation_config(sampling),
            logits_processor=LogitsProcessorList([_Checked(), *processors]),
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=False,  # weights are whole here, so that no process has to go on for another
        )
    return [cut_at_eos(ids, sampling.eos_token_ids) for ids in sequences[:, width:].tolist()]


def generation_config(sampling: SamplingConfig) -> GenerationConfig:
    """The settings as ``transformers`` takes them.

    Raises:
        ValueError: values that mean nothing, or that contradict each other.
    """
    random_draw = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        do_sample=sampling.do_sample,
        eos_token_id=sampling.eos_token_ids,
        pad_token_id=sampling.pad_token_id,
        use_cache=True,
        **(random_draw if sampling.do_sample else {}),
        **{name: value for name, value in sampling.extra.items() if name not in SHAPING},
    )


class _Checked(LogitsProcessor):
    """Leaves logits as they are. ``generate`` ends a process on CUDA, and goes on where it does not draw."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(scores)
        return scores


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    # a hub model's generation_config.json (top_p, repetition_penalty ...) would fill in whatever we leave out, and the
    # policy that samples would no longer be the one whose log-probabilities are trained
    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in KEPT_SETTINGS}
    model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = own
