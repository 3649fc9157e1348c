"""Online methods: draw prompts, sample groups of responses, score them, and train on the collection."""

from __future__ import annotations

import json
import time
import uuid
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trlx import logging
from trlx.backends.interrupts import interruptible, leave_if_asked
from trlx.backends.vllm import sampler as _vllm  # noqa: F401  registers the sampler "vllm"
from trlx.batch import Rollout, Sample, TokenBatch
from trlx.config import TRLConfig
from trlx.data.collate import drawn_logprobs
from trlx.data.prompts import Prompt, PromptPipeline, PromptStream
from trlx.data.store import Store, own_rows
from trlx.guard_rules import repeating
from trlx.method_configs import OnlineConfig
from trlx.methods.advantages import ScoreScale, kl_penalty, missing_eos_penalty
from trlx.methods.importance import importance_weights
from trlx.methods.masked import finish, histogram_of, mean_of, pack, spread_of
from trlx.rewards.results import Scored, means, total
from trlx.run.guards import check_first_kl
from trlx.sampling.settings import SamplingConfig, check_rollouts
from trlx.tracking import Tracker
from trlx.trainer.base import Trainer
from trlx.trainer.contract import check_collection
from trlx.trainer.evaluate import lengths

logger = logging.get_logger(__name__)

EXACT_GAP = 1e-4
"""Nats up to which the log-probabilities of sampler and policy count as the same; float32 stays within 1e-5."""
LARGE_GAP = 0.05
"""Nats between log-probabilities of sampler and policy; bfloat16 explains about 0.01."""
SAMPLES_ON_DISK = 8
"""Rollouts of each collection that are written as text."""


class OnlineTrainer(Trainer):
    """Trains on the policy's own samples, scored by reward_fn.

    Each epoch makes one collection: it draws prompts, samples `samples_per_prompt` responses to each, scores them with
    reward_fn, and evaluates the model on them. A method adds `advantages` and `loss`.
    """

    online = True
    method_class = OnlineConfig
    samples_per_prompt: int = 1
    """Responses to each prompt. They form one group: one process samples them, and they are neighbouring rows."""

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        self.stream: PromptStream | None = None
        self._gap_told = False
        self._is_exact: bool | None = None
        """Whether log-probabilities of sampler and policy were the same; None before they were compared."""
        super().__init__(config, reward_fn, metric_fn, stop_sequences)
        self.scale = self.score_scale()
        self.sampler.check(self.rollout_sampling)
        if config.train.rollouts_ahead and not self.sampler.works_ahead:
            raise ValueError(
                f"train.rollouts_ahead: 1 needs a sampler that works while the model trains, such as train.sampler: "
                f"{{engine: vllm}}; {type(self.sampler).__name__} does not"
            )
        self.log = RolloutLog(config, self.tokenizer)

    def check(self) -> None:
        super().check()
        if self.reward_fn is None:
            raise ValueError(
                f"{type(self).__name__} needs reward_fn: a function of samples, prompts and outputs that returns their "
                "scores"
            )
        check_rollouts(self.sampling_kwargs, self.method.sampling_key)

    @abstractmethod
    def advantages(self, batch: TokenBatch) -> TokenBatch:
        """Adds the columns that `loss` reads to a collection. Every process gets the whole collection.

        `batch` has ``scores`` (clipped and scaled as the config says), ``group``, ``old_logprobs``, and if `needs` asks
        for them ``old_values`` and ``ref_logprobs``. Put numbers to log into `pending`.
        """

    @cached_property
    def rollout_sampling(self) -> SamplingConfig:
        """How rollouts are sampled."""
        return self.sampling(self.method.sampling, self.method.sampling_key)

    @property
    def logprob_temperature(self) -> float:
        return self.rollout_sampling.logprob_temperature

    @property
    def rows_at_once(self) -> int:
        return self.method.chunk_size

    def score_scale(self) -> ScoreScale:
        """How scores are clipped and divided."""
        return ScoreScale(self.method.scale_reward, self.method.cliprange_reward, self.method.ref_std)

    def add_prompt_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts to sample from."""
        self.stream = PromptStream(pipeline, self.config.train.seed)
        self.prompt_digest = pipeline.digest()
        self.scorer.check(pipeline[0].metadata)
        rows, size = self.rows_per_epoch, self.schedule.batch_size
        if rows is not None and (rows != self.method.num_rollouts or rows % size):
            logger.info(
                f"A collection has {rows} rollouts, for method.num_rollouts {self.method.num_rollouts} and groups of "
                f"{self.samples_per_prompt}; the last step of each pass trains on {rows % size or size} of them, the "
                f"others on {size}"
            )

    @property
    def sampling_kwargs(self) -> dict[str, Any]:
        return self.method.sampling

    @property
    def rows_per_epoch(self) -> int:
        block = self.samples_per_prompt * self.backend.data_size
        return -(-self.method.num_rollouts // block) * block

    @property
    def data_digest(self) -> str:
        return self.prompt_digest

    def collect(self) -> Store:
        began, self.pending = time.perf_counter(), {}
        self.backend.forget_rows()
        rollouts = self.sample(self.stream.take(self.rows_per_epoch // self.samples_per_prompt))
        self.report(rollouts)
        batch = self.backend.row_format.collate(rollouts, self.tokenizer.pad_token_id)
        is_known = self._has_policy_columns(batch)
        batch = self._with_model_columns(batch, is_known)
        weights = None if is_known else self._compare(rollouts, batch)
        batch = self._with_scaled_scores(batch)
        batch = check_collection(type(self).__name__, batch, self.advantages(batch))
        if weights is not None:
            batch = batch.replace(advantages=batch.advantages * weights)
        self.log_histograms(rollouts, None if batch.advantages is None else batch.advantages[batch.response_mask])
        self._sample_ahead(len(batch))
        self.pending["time/rollout_time"] = time.perf_counter() - began
        return batch

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        """Samples and scores `samples_per_prompt` rollouts for each prompt, in order; every process gets all of them.

        The processes share each chunk of prompts. reward_fn scores one chunk while the next is sampled.

        Raises:
            RewardError: on every process, see `Scorer.score`.
            Interrupted: on every process, if one of them got a signal.
        """
        rollouts: list[Rollout] = []
        jobs, generating, size = [], 0.0, self._prompts_per_chunk
        for start in range(0, len(prompts), size):
            leave_if_asked(self.backend)
            self.display.working(f"sampling {len(rollouts)}/{len(prompts) * self.samples_per_prompt}")
            began = time.perf_counter()
            mine = self._sample(prompts[start : start + size], start)
            generating += time.perf_counter() - began
            chunk = self.backend.gather_objects(mine)
            rollouts += chunk
            jobs.append(self._submit(mine, chunk))
        began = time.perf_counter()
        self.display.working("waiting for scores")
        for rollout, scored in zip(rollouts, self._wait(jobs), strict=True):
            rollout.score, rollout.parts = scored.score, scored.parts
        for name, seconds in (("generate", generating), ("score", time.perf_counter() - began)):
            self.pending[f"time/rollout_{name}"] = self.pending.get(f"time/rollout_{name}", 0.0) + seconds
        return rollouts

    def report(self, rollouts: list[Rollout]) -> None:
        """Logs means of new rollouts, and writes some of them to disk."""
        self.pending |= {
            **{f"rollout_scores/{name}/mean": mean for name, mean in means(r.parts for r in rollouts).items()},
            **{f"rollouts/{name}": mean for name, mean in lengths(rollouts).items()},
            "rollouts/repeating": repeating([r.response for r in rollouts], [r.prompt for r in rollouts]),
        }
        if self.backend.is_main:
            self.log.write(rollouts, self.tracker, self.schedule.step)

    def log_histograms(self, rollouts: list[Rollout], advantages: Tensor | None = None) -> None:
        """Writes how the scores of new rollouts, and the advantages of their response tokens, are distributed."""
        if self.backend.is_main and self.tracker is not None:
            columns = {"scores": torch.tensor([total(r.score) for r in rollouts]), "advantages": advantages}
            rows = [{"name": name, **histogram_of(x)} for name, x in columns.items() if x is not None]
            self.tracker.log_samples("histogram", self.schedule.step, rows)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "scale": self.scale.state_dict(),
            "prompts_drawn": self.stream.position,
            "temperature": self.logprob_temperature,
            "exact": self._is_exact,
            "ahead": self.sampler.begun(),
            "rollouts": self.store.columns() if isinstance(self.store, TokenBatch) else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scale.load_state_dict(state["scale"])
        self.stream.position = state["prompts_drawn"]
        self._is_exact = state.get("exact")
        self.sampler.go_on(state.get("ahead", []))
        needs, rollouts = self.model_needs, state["rollouts"]
        # at another temperature the log-probabilities belong to another policy
        fits = rollouts and state["temperature"] == self.logprob_temperature
        fits = fits and ("ref_logprobs" in rollouts or not needs.reference)
        self.store = TokenBatch(**rollouts) if fits and ("old_values" in rollouts or not needs.value_head) else None
        if self.store is None:
            self.schedule.restart_epoch()
        elif self.schedule.settle(len(self.store)):
            self.store = None

    @property
    def _prompts_per_chunk(self) -> int:
        """Prompts that all processes together sample from at once."""
        return max(self.rows_at_once // self.samples_per_prompt, 1) * self.backend.data_size

    def _sample(self, prompts: list[Prompt], first_group: int) -> list[Rollout]:
        """Samples this process's consecutive share of `prompts`, without scores."""
        mine = own_rows(len(prompts), self.backend.data_rank, self.backend.data_size)
        groups = enumerate(prompts[mine], first_group + mine.start)
        asked = [(group, prompt) for group, prompt in groups for _ in range(self.samples_per_prompt)]
        drawn: list[Sample] = []
        # every process draws equally often; a group larger than `rows_at_once` takes several draws
        for start in range(0, (mine.stop - mine.start) * self.samples_per_prompt, self.rows_at_once):
            rows = asked[start : start + self.rows_at_once]
            drawn += self.draw([prompt.ids for _, prompt in rows], self.rollout_sampling, begun=True)
        pairs = zip(asked, drawn, strict=True)
        return [self.rollout_sampling.rollout(prompt, sample, group) for (group, prompt), sample in pairs]

    @property
    def _scores_on_each_rank(self) -> bool:
        """Whether every process calls reward_fn on its own rollouts; otherwise the main process calls it on all."""
        return self.config.train.reward_on == "each_rank"

    def _submit(self, mine: list[Rollout], chunk: list[Rollout]) -> Any:
        """Starts to score a chunk, if this process scores; returns a function that waits for the scores."""
        rollouts, asked = (mine, self.backend.leads) if self._scores_on_each_rank else (chunk, self.backend.is_main)
        if not (rollouts and asked):
            return list
        return self.scorer.submit(rollouts, self.schedule.step, self.config.train.eos_in_outputs).result

    def _wait(self, jobs: list) -> list[Scored]:
        """Waits for the scores of all chunks, in the order of the gathered rollouts."""
        if self._scores_on_each_rank:
            return [score for job in jobs for score in self.backend.on_each_rank(interruptible()(job))]
        return self.backend.on_main(interruptible()(lambda: [score for job in jobs for score in job()]))

    def _has_policy_columns(self, batch: TokenBatch) -> bool:
        """Whether the sampler has said all that a pass of the policy would say, up to rounding in float32. In half
        precision a cache changes log-probabilities by 0.01, and the ratio of the first update would not be 1."""
        columns = [batch.old_logprobs, *([batch.old_values] if self.model_needs.value_head else [])]
        is_exact = self.sampler.exact and self._is_exact and self.backend.precision == torch.float32
        return bool(is_exact) and all(column is not None for column in columns)

    def _with_model_columns(self, batch: TokenBatch, is_known: bool = False) -> TokenBatch:
        """Adds the outputs of the policy, unless they are known, and of the reference. Each process evaluates its share
        of rows."""
        needs, rows = self.model_needs, own_rows(len(batch), self.backend.data_rank, self.backend.data_size)
        mine = TokenBatch(**{name: column[rows] for name, column in batch.columns().items()})
        found = {}
        if not is_known:
            policy = self.backend.evaluate(mine)
            found = {"old_logprobs": policy.logprobs} | ({"old_values": policy.values} if needs.value_head else {})
        if needs.reference:
            found["ref_logprobs"] = self.backend.evaluate(mine, reference=True).logprobs
        if self.backend.data_size > 1 and found:
            shares = self.backend.gather_objects([found])
            found = {name: torch.cat([share[name] for share in shares]) for name in found}
        batch = batch.replace(**found)
        self.pending |= finish(*pack({"policy/entropy": mean_of(-batch.old_logprobs, batch.response_mask)}))
        self.pending |= self._kl(batch) if needs.reference else {}
        return batch

    def _kl(self, batch: TokenBatch) -> dict[str, float]:
        """KL between policy and reference, in nats per sequence and per token."""
        mask = batch.response_mask
        kl = kl_penalty(batch.old_logprobs, batch.ref_logprobs, "k3") * mask
        per_sequence = float(kl.sum(dim=1).mean())
        if self.schedule.step == 0 and self.backend.starts_at_reference:
            check_first_kl(float(kl[mask].mean()), self.backend.precision)
        stats = {"policy/kl": per_sequence, "policy/sqrt_kl": max(per_sequence, 0.0) ** 0.5}
        return stats | finish(*pack({"policy/kl_per_token": mean_of(kl, mask)}))

    def _with_scaled_scores(self, batch: TokenBatch) -> TokenBatch:
        """Clips and scales the scores, and subtracts the penalty of a missing eos, as the config says."""
        scores, stats = self.scale(batch.scores)
        self.pending |= {f"rollout_scores/{name}": value for name, value in stats.items()}
        penalty = self.method.missing_eos_penalty
        if penalty:
            ends = self.rollout_sampling.eos_token_ids
            scores = missing_eos_penalty(scores, batch.tokens, batch.response_mask, ends, penalty)
        return batch.replace(scores=scores)

    def _compare(self, rollouts: list[Rollout], batch: TokenBatch) -> Tensor | None:
        """Logs how far the sampler's log-probabilities are from the policy's, and warns once if that is far. Returns
        the weights that correct for it, if ``method.importance_cap`` asks for them.

        Raises:
            ValueError: it does, but the sampler does not say with which probabilities it draws.
        """
        drawn, known = drawn_logprobs(rollouts, batch)
        cap = getattr(self.method, "importance_cap", None)
        if not known.any():
            if cap is not None:
                raise ValueError(
                    f"method.importance_cap needs the log-probabilities of {type(self.sampler).__name__}, which gives "
                    "none with these settings: sample with top_k 0, top_p 1 and no penalty, or leave it out"
                )
            return None
        weights, metrics = importance_weights(batch.old_logprobs, drawn, known, cap)
        gaps = (batch.old_logprobs - drawn)[known].abs()
        self.pending |= finish(*pack({"rollouts/logprob_gap": spread_of(gaps), **metrics}))
        if self._is_exact is None:
            self._is_exact = self.pending["rollouts/logprob_gap/max"] <= EXACT_GAP
        mean = self.pending["rollouts/logprob_gap/mean"]
        if mean > LARGE_GAP and cap is None and not self._gap_told:
            self._gap_told = True
            logger.warning(
                f"The log-probabilities of {type(self.sampler).__name__} are {mean:.2g} nats from the policy's in the "
                "mean: it samples from other weights or at another temperature",
            )
        return None if cap is None else weights

    def _sample_ahead(self, rows: int) -> None:
        """Lets the sampler begin the next collection, if ``train.rollouts_ahead`` asks for it and there will be one."""
        steps = self.passes_per_epoch * -(-rows // self.schedule.batch_size)
        last = self.total_steps
        if not self.config.train.rollouts_ahead or (last is not None and self.schedule.step + steps >= last):
            return
        prompts = self.stream.peek(self.rows_per_epoch // self.samples_per_prompt)
        mine = own_rows(len(prompts), self.backend.data_rank, self.backend.data_size)
        asked = [prompt.ids for prompt in prompts[mine] for _ in range(self.samples_per_prompt)]
        self.sampler.sync(self.schedule.step, self.backend.weights_by_name)
        self.sampler.begin(asked, self.rollout_sampling)


class RolloutLog:
    """Writes rollouts: a few as text beside the metrics, all token ids to ``train.rollout_logging_dir``."""

    def __init__(self, config: TRLConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        if config.train.rollout_logging_dir is not None:
            Path(config.train.rollout_logging_dir).mkdir(parents=True, exist_ok=True)

    def write(self, rollouts: list[Rollout], tracker: Tracker | None, step: int) -> None:
        """Call it on the main process, once per collection."""
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
