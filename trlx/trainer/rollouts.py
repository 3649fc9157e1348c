"""Rollouts of the online methods: sampled by all processes, scored meanwhile, and a few of them shown."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trlx.backends.base import Backend
from trlx.batch import Rollout
from trlx.config import TrainConfig, TRLConfig
from trlx.data.prompts import Prompt
from trlx.data.store import own_rows
from trlx.rewards.results import Scored, means
from trlx.rewards.scoring import Scorer
from trlx.run.display import Display
from trlx.run.guards import interruptible, leave_if_asked
from trlx.sampling.settings import SamplingConfig
from trlx.tracking import Tracker
from trlx.trainer.together import on_each_rank, on_main

SAMPLES_ON_DISK = 8
"""Rollouts of each collection that are written beside the metrics, to look at."""


@dataclass(frozen=True, slots=True)
class RolloutSource:
    """Turns prompts into scored rollouts, the same list on every process and for any number of them."""

    backend: Backend
    scorer: Scorer
    sampling: SamplingConfig
    train: TrainConfig
    display: Display

    def __post_init__(self):
        self.backend.check_sampling(self.sampling)

    def collect(self, chunks: Iterable[list[Prompt]], step: int) -> tuple[list[Rollout], dict[str, float]]:
        """One rollout per prompt, in order; the seconds it took, and the means of what the scores are made of.

        Each chunk of prompts is shared by the processes; while it is scored the next one is generated. `step` is what
        reward_fn hears of the run.

        Raises:
            RewardError: on every process, see `Scorer.score`.
            Interrupted: on every process, when any got a signal.
        """
        rollouts, jobs, generating = [], [], 0.0
        chunks = list(chunks)
        total = sum(map(len, chunks))
        for prompts in chunks:
            leave_if_asked(self.backend)
            self.display.working(f"sampling {len(rollouts)}/{total}")
            began = time.perf_counter()
            mine = self._sample(prompts)
            generating += time.perf_counter() - began
            chunk = self.backend.gather_objects(mine)
            rollouts += chunk
            to_score = mine if self.score_on_each_rank else chunk
            wanted = to_score and (self.backend.leads if self.score_on_each_rank else self.backend.is_main)
            eos_in_outputs = self.train.eos_in_outputs
            jobs.append(self.scorer.submit(to_score, step, eos_in_outputs).result if wanted else list)
        began = time.perf_counter()
        self.display.working("waiting for scores")
        for rollout, scored in zip(rollouts, self._wait(jobs), strict=True):
            rollout.score, rollout.parts = scored.score, scored.parts
        stats = {f"rollout_scores/{name}/mean": mean for name, mean in means(r.parts for r in rollouts).items()}
        waited = time.perf_counter() - began
        return rollouts, {**stats, "time/rollout_generate": generating, "time/rollout_score": waited}

    def _sample(self, prompts: list[Prompt]) -> list[Rollout]:
        """Unscored rollouts of this process's consecutive share of `prompts`."""
        mine = prompts[own_rows(len(prompts), self.backend.data_rank, self.backend.data_size)]
        responses = self.backend.generate([prompt.ids for prompt in mine], self.sampling)
        return self.sampling.rollouts(mine, responses)

    @property
    def score_on_each_rank(self) -> bool:
        """Every process calls reward_fn on its own rollouts; else the main one does on all."""
        return self.train.reward_on == "each_rank"

    def _wait(self, jobs: list) -> list[Scored]:
        """The scores of all chunks, in the order of the gathered rollouts."""
        if self.score_on_each_rank:
            return [score for job in jobs for score in on_each_rank(self.backend, interruptible()(job))]
        return on_main(self.backend, interruptible()(lambda: [score for job in jobs for score in job()]))


class RolloutLog:
    """Writes rollouts down: a few as text beside the metrics, all token ids in ``train.rollout_logging_dir``."""

    def __init__(self, config: TRLConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        if config.train.rollout_logging_dir is not None:
            Path(config.train.rollout_logging_dir).mkdir(parents=True, exist_ok=True)

    def write(self, rollouts: list[Rollout], tracker: Tracker | None, step: int) -> None:
        """To be called on the main process, once per collection."""
        if tracker is not None:
            tracker.log_samples("rollout", step, [self._texts(rollout) for rollout in rollouts[:SAMPLES_ON_DISK]])
        if self.config.train.rollout_logging_dir is not None:
            rows = [{"query_tensor": r.prompt, "response_tensor": r.response, "score": r.score} for r in rollouts]
            (self._folder / f"epoch-{time.time_ns()}.json").write_text(json.dumps(rows))

    def _texts(self, rollout: Rollout) -> dict[str, Any]:
        prompt, response = self.tokenizer.decode(rollout.prompt), self.tokenizer.decode(rollout.response)
        parts = {"parts": rollout.parts} if rollout.parts else {}
        return {"prompt": prompt, "response": response, "score": rollout.score, **parts}

    @cached_property
    def _folder(self) -> Path:
        folder = Path(self.config.train.rollout_logging_dir) / f"run-{uuid.uuid4()}"
        folder.mkdir()
        (folder / "config.json").write_text(str(self.config))
        return folder
