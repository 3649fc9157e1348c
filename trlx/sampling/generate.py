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
from trlx.sampling.settings import SamplingConfig, cut_at_eos

KEPT_SETTINGS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What a model's own generation settings may still decide; they say how its sequences are built, not how to sample."""


class TransformersSampler(Sampler):
    """Samples from the weights that train, with all that ``GenerationConfig`` knows.

    Args:
        around: makes the context that the model runs in, e.g. under autocast.
    """

    def __init__(
        self,
        policy: Policy,
        device: torch.device | str,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.policy = policy
        self.device = torch.device(device)
        self.around = around

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
            return [Sample(ids, version=self.version) for ids in self._responses(prompts, sampling)]

    def _responses(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[list[int]]:
        if not prompts:
            return []
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
                synced_gpus=False,  # weights are whole here, so that no process has to go on for another
            )
        return [cut_at_eos(ids, sampling.eos_token_ids) for ids in sequences[:, width:].tolist()]


class _AsProcessor(LogitsProcessor):
    """`Rules` as ``generate`` calls them.

    Args:
        begun: the tokens before each response, which stand in the first `width` columns.
    """

    def __init__(self, rules: Rules, policy: Policy, begun: list[list[int]], width: int):
        self.rules = rules
        self.policy = policy
        self.begun = begun
        self.width = width
        self.states: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        def rows() -> list[list[int]]:
            beams = len(input_ids) // len(self.begun)
            new = input_ids[:, self.width :].tolist()
            return [[*self.begun[index // beams], *ids] for index, ids in enumerate(new)]

        step = input_ids.shape[1] - self.width
        return self.rules(scores, input_ids[:, -1], rows, step, self.states)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the states that logits come from are noted, where a rule needs them."""
        with ExitStack() as stack:
            if self.rules.beta:
                # the trunk's output is what the heads are trained on, whatever a model does before its output head
                for module in state_givers(self.policy.model):
                    stack.callback(module.register_forward_hook(self._note).remove)
            yield

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.states = output[0][:, -1]


def generation_config(sampling: SamplingConfig) -> GenerationConfig:
    """The settings as ``transformers`` takes them, without those that have a rule of ours (see `Rules`).

    Raises:
        ValueError: values that mean nothing, or that contradict each other.
    """
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.do_sample,
        eos_token_id=sampling.eos_token_ids,
        pad_token_id=sampling.pad_token_id,
        use_cache=True,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampling.do_sample else {}),
        **{name: value for name, value in sampling.extra.items() if name not in KNOWN},
    )


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
