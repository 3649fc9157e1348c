"""ILQL: learn Q and V from samples with rewards, and sample tokens of high Q."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.batch import TokenBatch, TokenOutputs
from trlx.data.dialogue import dialogues
from trlx.method_configs import ILQL_SAMPLING, ILQLConfig
from trlx.methods.ilql import ilql_loss, normalize_returns
from trlx.methods.masked import Metrics
from trlx.sampling.settings import SamplingConfig
from trlx.trainer.base import Trainer


class ILQLTrainer(Trainer):
    """Implicit language Q-learning: offline reinforcement learning on dialogues with one reward each.

    Args:
        logit_mask: bool [V, V], True where the token of the column must not follow the token of the row. Sampling uses
            it; set it in ``train.trainer_kwargs``.
    """

    method_class = ILQLConfig
    rewarded = True
    logit_mask: Any = None

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None, logit_mask=None):
        self.logit_mask = logit_mask
        super().__init__(config, reward_fn, metric_fn, stop_sequences)

    @staticmethod
    def needs(method: ILQLConfig) -> ModelNeeds:
        return ModelNeeds(value_head=True, q_heads=2 if method.two_qs else 1)

    def sampling(self, gen_kwargs: dict[str, Any], *where: str) -> SamplingConfig:
        sampling = super().sampling({**ILQL_SAMPLING, **gen_kwargs}, *where)
        if self.logit_mask is None:
            return sampling
        return replace(sampling, extra={**sampling.extra, "logit_mask": self.logit_mask})

    def make_experience(self, samples: list[Any], rewards: Sequence[float], seq_length: int) -> None:
        """Tokenizes the samples as SFT does, normalises the rewards, and puts each at its sample's last response token.

        Raises:
            ValueError: a reward is not a finite number.
        """
        numbers = [float(reward) for reward in rewards]
        for index, number in enumerate(numbers):
            if not math.isfinite(number):
                raise ValueError(f"rewards[{index}] is {number}: every sample needs a finite number")
        special_tokens = self.backend.row_format.special_tokens
        rollouts = dialogues(samples, self.tokenizer, seq_length, numbers, special_tokens)
        scores = normalize_returns([rollout.score for rollout in rollouts])
        for rollout, score in zip(rollouts, scores, strict=True):
            rollout.score = score
        self.learn_from(rollouts)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        return ilql_loss(
            outputs,
            batch,
            tau=method.tau,
            gamma=method.gamma,
            cql_scale=method.cql_scale,
            awac_scale=method.awac_scale,
            beta=method.beta,
        )

    def after_step(self, metrics: dict[str, float]) -> None:
        if self.schedule.step % self.method.steps_for_target_q_sync == 0:
            self.backend.update_heads(lambda heads: heads["q"].sync(self.method.alpha))
