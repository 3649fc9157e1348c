"""PPO: sample, score, estimate advantages; then several passes of clipped updates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trlx import logging
from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.prompts import Prompt, PromptPipeline, PromptStream
from trlx.data.store import own_rows
from trlx.method_configs import PPOConfig
from trlx.methods.masked import Metrics, RunningMoments, finish, mean_of, pack, whiten
from trlx.methods.ppo import (
    AdaptiveKL,
    FixedKL,
    clip_scores,
    gae,
    kl_penalty,
    missing_eos_penalty,
    ppo_loss,
    scale_scores,
    token_rewards,
)
from trlx.sampling.settings import GEN_KWARGS, check_rollouts
from trlx.trainer.base import Trainer
from trlx.trainer.first_step import check_first_kl, check_first_ratio
from trlx.trainer.rollouts import RolloutLog, RolloutSource

logger = logging.get_logger(__name__)


class PPOTrainer(Trainer):
    """Proximal policy optimization with a KL penalty to the first policy."""

    online = True

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        if not isinstance(config.method, PPOConfig):
            raise ValueError(f"{type(self).__name__} needs method.name PPOConfig, got {config.method.name}")
        if reward_fn is None:
            raise ValueError(
                "PPO needs reward_fn: a function of samples, prompts and outputs that returns their scores"
            )
        method: PPOConfig = config.method
        self.sampling_key = "method.gen_experience_kwargs" if method.gen_experience_kwargs else GEN_KWARGS
        check_rollouts(method.sampling, self.sampling_key)
        self.method = method
        self.inner_epochs = method.ppo_epochs
        self.eval_batch_size = method.chunk_size
        self.kl = FixedKL(method.init_kl_coef)
        if method.target is not None:
            self.kl = AdaptiveKL(method.init_kl_coef, method.target, method.horizon)
        self.moments = RunningMoments()
        self.ref_std = method.ref_std
        self.clips_all = False  # that a warning says so
        self.stream: PromptStream | None = None
        super().__init__(config, reward_fn, metric_fn, stop_sequences)
        self.source = RolloutSource(
            self.backend,
            self.scorer,
            self.sampling(method.sampling, self.sampling_key),
            config.train,
            self.display,
        )
        self.log = RolloutLog(config, self.tokenizer)

    @staticmethod
    def model_needs(method: PPOConfig) -> ModelNeeds:
        # no dropout: it would make the policy that is trained another than the one that sampled
        return ModelNeeds(value_head=True, value_layers=method.num_value_layers_unfrozen, reference=True, dropout=False)

    def needs(self) -> ModelNeeds:
        temperature = self.sampling(self.method.sampling, self.sampling_key).logprob_temperature
        return replace(super().needs(), temperature=temperature)

    def add_prompt_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts that rollouts start from."""
        self.stream = PromptStream(pipeline, self.config.train.seed)
        self.prompt_digest = pipeline.digest()
        self.scorer.check(pipeline[0].metadata)

    @property
    def sampling_kwargs(self) -> dict[str, Any]:
        return self.method.sampling

    @property
    def rows_per_epoch(self) -> int:
        size = self.backend.data_size
        return -(-self.method.num_rollouts // size) * size

    @property
    def data_digest(self) -> str:
        return self.prompt_digest

    def loss(self, scores: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        return ppo_loss(scores, batch, method.cliprange, method.cliprange_value, method.vf_coef, method.dual_clip)

    def collect(self) -> TokenBatch:
        began = time.perf_counter()
        rollouts, source_stats = self.source.collect(self._chunks(), self.state.step)
        batch = self._with_model_columns(self.backend.row_format.collate(rollouts, self.source.sampling.pad_token_id))
        batch, score_stats = self._with_scaled_scores(batch)
        batch, kl_stats = self._with_advantages(batch)
        self.pending = {
            **score_stats,
            **kl_stats,
            **source_stats,
            **_shape_stats(rollouts),
        }
        self.pending["time/rollout_time"] = time.perf_counter() - began
        if self.backend.is_main:
            self.log.write(rollouts, self.tracker, self.state.step)
        return batch

    def after_step(self, metrics: dict[str, float]) -> None:
        if self.state.step == 1:
            check_first_ratio(metrics["policy/ratio_deviation/max"])

    def method_state(self) -> dict[str, Any]:
        return {
            "kl": self.kl.state(),
            "moments": self.moments.state(),
            "ref_std": self.ref_std,
            "prompts_drawn": self.stream.position,
            "temperature": self.source.sampling.logprob_temperature,
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.kl.load(state["kl"])
        self.moments.load(state["moments"])
        self.ref_std = self.method.ref_std or state["ref_std"]
        self.stream.position = state["prompts_drawn"]

    def read_rollouts(self, folder: Path) -> None:
        super().read_rollouts(folder)
        if self.state.method["temperature"] != self.source.sampling.logprob_temperature:
            self.store = None  # their log-probabilities are those of another policy

    def _chunks(self) -> Iterator[list[Prompt]]:
        """The prompts of one collection, in the pieces that all processes generate at once."""
        missing = self.rows_per_epoch
        while missing:
            chunk = self.stream.take(min(self.method.chunk_size * self.backend.data_size, missing))
            missing -= len(chunk)
            yield chunk

    def _with_model_columns(self, batch: TokenBatch) -> TokenBatch:
        """Log-probabilities and values under policy and reference; every process scores its share of rows."""
        rows = own_rows(len(batch), self.backend.data_rank, self.backend.data_size)
        mine = TokenBatch(**{name: column[rows] for name, column in batch.columns().items()})
        policy, reference = self.backend.evaluate(mine), self.backend.evaluate(mine, reference=True)
        columns = [policy.logprobs, policy.values, reference.logprobs]
        if self.backend.data_size > 1:
            pieces = self.backend.gather_objects([columns])
            columns = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return batch.replace(old_logprobs=columns[0], old_values=columns[1], ref_logprobs=columns[2])

    def _with_scaled_scores(self, batch: TokenBatch) -> tuple[TokenBatch, dict[str, float]]:
        method = self.method
        scores = clip_scores(batch.scores, method.cliprange_reward)
        if not self.clips_all and (scores != batch.scores).any(dim=1).all():
            self.clips_all = True
            logger.warning(
                f"method.cliprange_reward ({method.cliprange_reward:g}) clips the score of every rollout, so that they "
                "are all alike: raise it, or write null for no limit"
            )
        # of what is clipped already: a single outlier would make all other scores small for the rest of the run
        mean, std = self.moments.update(scores.sum(dim=1))
        if self.ref_std is None:
            self.ref_std = std
        divisor = {"running": self.moments.std, "ref": self.ref_std}.get(method.scale_reward)
        scores = scale_scores(scores, divisor)
        if method.missing_eos_penalty:
            scores = missing_eos_penalty(
                scores,
                batch.tokens,
                batch.response_mask,
                self.source.sampling.eos_token_ids,
                method.missing_eos_penalty,
            )
        stats = {
            "rollout_scores/mean": mean,
            "rollout_scores/std": std,
            "rollout_scores/running_mean": self.moments.mean,
            "rollout_scores/running_std": self.moments.std,
        }
        return batch.replace(scores=scores), stats

    def _with_advantages(self, batch: TokenBatch) -> tuple[TokenBatch, dict[str, float]]:
        mask, method = batch.response_mask, self.method
        coefficient = self.kl.coef
        rewards = token_rewards(
            batch.scores, batch.old_logprobs, batch.ref_logprobs, mask, coefficient, estimator=method.kl_estimator
        )
        advantages, returns = gae(rewards, batch.old_values, mask, method.gamma, method.lam)
        kl = kl_penalty(batch.old_logprobs, batch.ref_logprobs, "k3") * mask
        per_sequence = float(kl.sum(dim=1).mean())
        if self.state.step == 0 and self.backend.starts_at_reference:
            check_first_kl(float(kl[mask].mean()), self.backend.precision)
        self.kl.update(per_sequence, len(batch))
        stats = finish(*pack({"policy/kl_per_token": mean_of(kl, mask)}))
        stats |= {
            "policy/kl": per_sequence,
            "policy/sqrt_kl": max(per_sequence, 0.0) ** 0.5,
            "kl_ctl_value": coefficient,
        }
        return batch.replace(advantages=whiten(advantages, mask), returns=returns), stats


def _shape_stats(rollouts: list[Rollout]) -> dict[str, float]:
    count = len(rollouts)
    return {
        "rollouts/response_length": sum(len(r.response) for r in rollouts) / count,
        "rollouts/ended": sum(r.ended for r in rollouts) / count,
    }
