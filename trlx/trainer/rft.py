"""Rejection fine-tuning: sample, keep the best of each prompt under a rising threshold, imitate them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trlx import checkpoint
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.prompts import Prompt, PromptPipeline
from trlx.data.store import RolloutStore
from trlx.method_configs import RFTConfig
from trlx.methods.masked import Metrics, finish, pack, spread_of
from trlx.methods.rft import percentile_at, select, thresholds
from trlx.methods.sft import sft_loss
from trlx.rewards.results import total
from trlx.sampling.settings import check_rollouts
from trlx.trainer.base import Trainer
from trlx.trainer.rollouts import RolloutLog, RolloutSource


class RFTTrainer(Trainer):
    """Supervised fine-tuning on the policy's own samples, the best of all so far.

    Every ``n_improve_steps`` epochs the samples grow by ``n_generations_per_prompt`` for each prompt; every epoch
    trains on those that reach the quantile of their prompt's scores.
    """

    online = True

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        if not isinstance(config.method, RFTConfig):
            raise ValueError(f"{type(self).__name__} needs method.name RFTConfig, got {config.method.name}")
        if reward_fn is None:
            raise ValueError(
                "RFT needs reward_fn: a function of samples, prompts and outputs that returns their scores"
            )
        check_rollouts(config.method.gen_kwargs, "method.gen_kwargs")
        self.method: RFTConfig = config.method
        self.history: list[Rollout] = []
        super().__init__(config, reward_fn, metric_fn, stop_sequences)
        self.source = RolloutSource(
            self.backend,
            self.scorer,
            self.sampling(self.method.gen_kwargs),
            config.train,
            self.display,
        )
        self.log = RolloutLog(config, self.tokenizer)

    def add_prompt_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts; each is sampled from at every growth."""
        self.pipeline = pipeline
        self.prompt_digest = pipeline.digest()
        self.scorer.check(pipeline[0].metadata)

    @property
    def rows_per_epoch(self) -> None:
        """Known only once samples are selected: train.epochs and train.total_steps both end training."""

    @property
    def data_digest(self) -> str:
        return self.prompt_digest

    def collect(self) -> RolloutStore:
        if self.state.epoch % self.method.n_improve_steps == 0:
            self._grow()
        chosen = self._selected()
        scores = torch.tensor([rollout.score for rollout in self.history], dtype=torch.float64)
        prompts = self._prompts()
        limits = thresholds(prompts, scores.tolist(), self._percentile)
        of_first = torch.tensor([prompt == prompts[0] for prompt in prompts])
        selected = Counter(tuple(rollout.prompt) for rollout in chosen.rollouts)
        spreads = {
            "scores_dist": spread_of(scores),
            "scores_per_single_prompt": spread_of(scores, of_first),
            "samples_per_single_prompt": spread_of(torch.tensor([selected[prompt] for prompt in limits])),
        }
        self.pending |= {
            **finish(*pack(spreads)),
            "scores_mean": float(scores.mean()),
            "thresholds": sum(limits.values()) / len(limits),
            "percentile": self._percentile,
            "len_samples_selected": float(len(chosen)),
        }
        return chosen

    def loss(self, scores: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return sft_loss(scores, batch)

    def write_rollouts(self, folder: Path) -> None:
        checkpoint.write_history(folder, self.history)

    def read_rollouts(self, folder: Path) -> None:
        self.history = checkpoint.read_history(folder)
        # at the end of an epoch the next selection is still to be made
        self.store = self._selected() if self.state.rows_done else None

    def _grow(self) -> None:
        """Adds scored samples of the present policy to the history."""
        began = time.perf_counter()
        rollouts, source_stats = self.source.collect(self._chunks(), self.state.step)
        for rollout in rollouts:
            rollout.score = total(rollout.score)
        if self.backend.is_main:
            self.log.write(rollouts, self.tracker, self.state.step)
        self.history += rollouts
        self.pending |= {**source_stats, "time/rollout_time": time.perf_counter() - began}

    def _chunks(self) -> Iterator[list[Prompt]]:
        """Every prompt n_generations_per_prompt times, in the pieces that all processes generate at once."""
        prompts = [self.pipeline[i] for i in range(len(self.pipeline))]
        wanted = [prompt for prompt in prompts for _ in range(self.method.n_generations_per_prompt)]
        size = self.config.train.batch_size * self.backend.data_size
        return (wanted[start : start + size] for start in range(0, len(wanted), size))

    def _selected(self) -> RolloutStore:
        """The samples of the present epoch: a function of history and epoch, so every process selects the same."""
        outputs, scores = [tuple(r.response) for r in self.history], [r.score for r in self.history]
        chosen = select(self._prompts(), outputs, scores, self._percentile)
        rollouts = [self.history[i] for i in chosen]
        return RolloutStore(rollouts, self.tokenizer.pad_token_id, self.backend.row_format)

    def _prompts(self) -> list[tuple[int, ...]]:
        return [tuple(rollout.prompt) for rollout in self.history]

    @property
    def _percentile(self) -> float:
        method = self.method
        return percentile_at(self.state.epoch, method.start_percentile, method.end_percentile, method.n_improve_steps)
