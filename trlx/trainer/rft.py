"""Rejection fine-tuning: sample, keep the best of each prompt under a rising threshold, imitate them."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.prompts import PromptPipeline
from trlx.data.store import RolloutStore
from trlx.method_configs import RFTConfig
from trlx.methods.advantages import ScoreScale
from trlx.methods.masked import Metrics, finish, pack, spread_of
from trlx.methods.rft import percentile_at, select, thresholds
from trlx.methods.sft import sft_loss
from trlx.rewards.results import total
from trlx.trainer.online import OnlineTrainer


class RFTTrainer(OnlineTrainer):
    """Supervised fine-tuning on the best of the policy's own samples.

    Every ``n_improve_steps`` epochs it samples ``n_generations_per_prompt`` more responses to each prompt. Every epoch
    trains on the samples that reach a quantile of their prompt's scores.
    """

    method_class = RFTConfig

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        self.pool: list[Rollout] = []
        super().__init__(config, reward_fn, metric_fn, stop_sequences)

    logprob_temperature = 1.0  # its loss is that of imitation

    @property
    def samples_per_prompt(self) -> int:
        return self.method.n_generations_per_prompt

    @property
    def rows_at_once(self) -> int:
        return self.config.train.batch_size

    @property
    def rows_per_epoch(self) -> None:
        """Unknown until samples are selected."""

    def score_scale(self) -> ScoreScale:
        return ScoreScale()

    def add_prompt_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts to sample from."""
        super().add_prompt_pipeline(pipeline)
        self.pipeline = pipeline

    def collect(self) -> RolloutStore:
        began = time.perf_counter()
        if self.schedule.epoch % self.method.n_improve_steps == 0:
            self.pending = {}
            grown = self.sample([self.pipeline[i] for i in range(len(self.pipeline))])
            for rollout in grown:
                rollout.score = total(rollout.score)
            self.report(grown)
            self.log_histograms(grown)
            self.pool = self.pool + grown
            self.pending["time/rollout_time"] = time.perf_counter() - began
        chosen = self._selected()
        self.pending |= self._stats(chosen)
        return chosen

    def advantages(self, batch: TokenBatch) -> TokenBatch:
        """Adds nothing: all selected samples count the same."""
        return batch

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return sft_loss(outputs, batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": [[r.prompt, r.response, r.score] for r in self.pool]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pool = [Rollout(prompt, response, score) for prompt, response, score in state["history"]]
        super().load_state_dict(state)
        # the history gives the selection of the epoch, so the epoch goes on where it was
        self.schedule.load_state_dict(state["schedule"])
        self.store = self._selected() if self.schedule.rows_done else None

    def _selected(self) -> RolloutStore:
        """Selects the samples of the present epoch. Every process has the same history, so it selects the same."""
        outputs, scores = [tuple(r.response) for r in self.pool], [r.score for r in self.pool]
        chosen = select(self._prompts(), outputs, scores, self._percentile)
        return self.store_of([self.pool[i] for i in chosen])

    def _stats(self, chosen: RolloutStore) -> dict[str, float]:
        prompts, scores = self._prompts(), torch.tensor([r.score for r in self.pool], dtype=torch.float64)
        limits = thresholds(prompts, scores.tolist(), self._percentile)
        of_first = torch.tensor([prompt == prompts[0] for prompt in prompts])
        selected = Counter(tuple(rollout.prompt) for rollout in chosen.rollouts)
        spreads = {
            "scores_dist": spread_of(scores),
            "scores_per_single_prompt": spread_of(scores, of_first),
            "samples_per_single_prompt": spread_of(torch.tensor([selected[prompt] for prompt in limits])),
        }
        return {
            **finish(*pack(spreads)),
            "scores_mean": float(scores.mean()),
            "thresholds": sum(limits.values()) / len(limits),
            "percentile": self._percentile,
            "len_samples_selected": float(len(chosen)),
        }

    def _prompts(self) -> list[tuple[int, ...]]:
        return [tuple(rollout.prompt) for rollout in self.pool]

    @property
    def _percentile(self) -> float:
        method = self.method
        return percentile_at(
            self.schedule.epoch, method.start_percentile, method.end_percentile, method.n_improve_steps
        )
