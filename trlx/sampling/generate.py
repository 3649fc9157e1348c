"""Sampling from a Hugging Face model with ``transformers``' own generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from trlx.batch import Sample
from trlx.models.decoder import output_head, state_givers
from trlx.models.policy import Policy
from trlx.sampling.base import Sampler
from trlx.sampling.rules import KNOWN, Rules
from trlx.sampling.settings import SamplingConfig, check_logits, cut_at_eos

KEPT_SETTINGS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What stays of a model's own ``generation_config``: how its sequences are built, but not how they are sampled."""


class TransformersSampler(Sampler):
    """Samples from the weights that train, with all settings of ``GenerationConfig``.

    Args:
        around: returns a context in which the model runs, e.g. autocast.
    """

    def __init__(
        self,
        policy: Policy,
        device: torch.device | str,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.policy, self.device, self.around = policy, torch.device(device), around

    def check(self, sampling: SamplingConfig) -> None:
        sampling.check_shaping(self.policy.q_heads is not None, output_head(self.policy.model).weight.shape[0])
        generation_config(sampling)
        Rules(sampling, self.device, self.policy.heads)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """See `Sampler.generate`.

        Raises:
            FloatingPointError: see `check_logits`.
        """
        self.check(sampling)
        self.policy.eval()
        with self.around():
            return self._samples(prompts, sampling) if prompts else []

    def _samples(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        inputs, width = self.policy.architecture.sampler_inputs(prompts, sampling.pad_token_id)
        begun = inputs["decoder_input_ids"].tolist() if "decoder_input_ids" in inputs else prompts
        rules = _AsProcessor(Rules(sampling, self.device, self.policy.heads), self.policy, begun, width)
        criteria = [sampling.stop.criteria(width)] if sampling.stop else []
        with _plain_settings(self.policy.model), rules.watching():
            sequences = self.policy.model.generate(
                **{name: v.to(self.device) if isinstance(v, Tensor) else v for name, v in inputs.items()},
                generation_config=generation_config(sampling),
                logits_processor=LogitsProcessorList([rules]),
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=False,  # each process has whole weights, so none waits for another
            )
        drawn = [cut_at_eos(ids, sampling.eos_token_ids) for ids in sequences[:, width:].tolist()]
        return [Sample(ids, version=self.version) for ids in drawn]


class _AsProcessor(LogitsProcessor):
    """`Rules` as ``generate`` calls them.

    Args:
        begun: for each prompt the tokens before the response; with padding they fill the first `width` columns.
    """

    def __init__(self, rules: Rules, policy: Policy, begun: list[list[int]], width: int):
        self.rules, self.policy, self.begun, self.width = rules, policy, begun, width
        self.states: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        def rows() -> list[list[int]]:
            beams = len(input_ids) // len(self.begun)
            new = input_ids[:, self.width :].tolist()
            return [[*self.begun[index // beams], *ids] for index, ids in enumerate(new)]

        check_logits(scores)
        step = input_ids.shape[1] - self.width
        return self.rules(scores, input_ids[:, -1], rows, step, self.states)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the last hidden states are noted, if ``beta`` needs them."""
        with ExitStack() as stack:
            # the heads are trained on the output of the trunk
            for module in state_givers(self.policy.model) if self.rules.beta else ():
                stack.callback(module.register_forward_hook(self._note).remove)
            yield

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.states = output[0][:, -1]


def generation_config(sampling: SamplingConfig) -> GenerationConfig:
    """The settings for ``generate``, without those that `Rules` apply.

    Raises:
        ValueError: transformers refuses a value, or two that contradict each other.
    """
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.do_sample,
        eos_token_id=sampling.eos_token_ids or None,  # beam search takes the first of a list
        pad_token_id=sampling.pad_token_id,
        use_cache=True,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampling.do_sample else {}),
        **{name: value for name, value in sampling.extra.items() if name not in KNOWN},
    )


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    # generate takes settings that we leave out (top_p, repetition_penalty ...) from the model's generation_config.json;
    # then the samples would not come from the policy that trains
    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in KEPT_SETTINGS}
    model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        model.generation_config = own
