"""The training loop, the same for every algorithm and backend."""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trlx import checkpoint, logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.backends.distress import watching
from trlx.backends.interrupts import Interrupts, leave_if_asked
from trlx.batch import Rollout, Sample, TokenBatch, TokenOutputs
from trlx.checkpoint import RandomState, own_randomness, seed_everything
from trlx.compat.attributes import OldNames
from trlx.config import TRLConfig
from trlx.data.prompts import PromptPipeline
from trlx.data.store import RolloutStore, Store, shard
from trlx.method_configs import MethodConfig
from trlx.methods.masked import Metrics
from trlx.methods.units import Unit
from trlx.models.source import tokenizer_for
from trlx.rewards.scoring import Scorer
from trlx.run import folder as run_folder
from trlx.run.callbacks import Callbacks
from trlx.run.changes import changes, identity, keeps_averages
from trlx.run.display import Display
from trlx.run.failures import rescuing
from trlx.run.guards import Guards
from trlx.run.hub import OnHub
from trlx.run.saving import Saver
from trlx.sampling.base import drawn, sampler_for
from trlx.sampling.settings import GEN_KWARGS, SamplingConfig, sweep_variants
from trlx.sampling.stopping import Stopper
from trlx.sampling.texts import Respond
from trlx.tracking import Sink, Tracker, logged
from trlx.trainer.contract import check_class, check_rollouts_given, checked_loss
from trlx.trainer.evaluate import Evaluator
from trlx.trainer.schedule import Schedule, check_blocks

logger = logging.get_logger(__name__)

OURS = ("config", "reward_fn", "metric_fn", "stop_sequences")
"""Arguments that `trlx.train` passes to a trainer; all others come from ``train.trainer_kwargs``."""


class Trainer(OldNames, OnHub, ABC):
    """Trains a model on a backend. A method is a subclass that defines `needs`, `loss`, and its data."""

    backend_class: ClassVar[type[Backend]]
    method_class: ClassVar[type[MethodConfig]] = MethodConfig
    """Class of the config's method section."""
    online: ClassVar[bool] = False
    """True: trains on its own samples, scored by reward_fn. False: trains on given samples."""
    rewarded: ClassVar[bool] = False
    """Whether `trlx.train` needs a reward for each given sample."""
    generates: ClassVar[bool] = True
    """False: the model generates nothing. Evaluations need `add_eval_samples`, which sets `evaluator`."""
    best_by: ClassVar[tuple[str, ...]] = ("reward/mean", "metrics/reward")
    """Metrics of an evaluation: `best_checkpoint` has the highest value of the first that is there."""
    unit: Unit = Unit.TOKEN
    """What `loss` sums over; the backend divides the sum by the number of units."""
    passes_per_epoch: int = 1
    """Passes over what `collect` returns."""

    def __init__(self, config: TRLConfig, reward_fn=None, metric_fn=None, stop_sequences=None):
        config.check()
        self.config, self.method = config, config.method
        self.reward_fn, self.metric_fn = reward_fn, metric_fn
        self.check()
        self.backend_class.check_source(config.model, config.train)
        source = self.backend_class.source(config.model, config.train)
        self.tokenizer = tokenizer_for(source, config.tokenizer, config.model.model_extra_configs)
        self.stopper = Stopper(self.tokenizer, stop_sequences) if stop_sequences else None
        self.eval_variants = [(name, self.sampling(each)) for name, each in sweep_variants(config.method.gen_kwargs)]
        self.model_needs = replace(self.needs(self.method), temperature=self.logprob_temperature)
        self.backend = self.backend_class(
            model=config.model,
            optimizer=config.optimizer,
            scheduler=config.scheduler,
            train=config.train,
            tokenizer=self.tokenizer,
            needs=self.model_needs,
        )
        self.store_of = partial(RolloutStore, pad_id=self.tokenizer.pad_token_id, row_format=self.backend.row_format)
        self.saver = Saver(self)
        self.sampler = sampler_for(config.train.sampler, self.backend, self.tokenizer)
        weakref.finalize(self, self.sampler.close)
        for _, sampling in self.eval_variants:
            self.sampler.check(sampling)
        seed_everything(config.train.seed + self.backend.data_rank)
        check_blocks(config.train.batch_size, self.backend.microbatch_size, self.rows_together)
        self.schedule = Schedule(config.train, self.passes_per_epoch, self.backend.data_size, self.rows_together)
        self.store: Store | None = None
        judged = (self.tokenizer, config.train.reward_timeout, self.backend.row_format.separator)
        self.scorer = None if reward_fn is None else Scorer(reward_fn, *judged)
        self.evaluator: Evaluator | None = None
        self.tracker: Tracker | None = None
        self.watchers: list[type[Sink]] = []  # see `Tracker`
        self.display = Display(self.backend.is_main)
        self.run_folder: Path | None = None  # of the run that this trainer continues; None: it starts a run
        self.callbacks = Callbacks(self)
        self.pending: dict[str, float] = {}  # collect() measured these; the next step logs them
        self.saved: tuple[Path, int] | None = None  # the last checkpoint to resume from, and its step
        self.at_boundary = True  # between two steps, where a checkpoint can be resumed exactly
        self.best_reward, self.best_step, self.best_metric = None, None, ""
        self.tracker_state: dict[str, Any] = {}
        self.guards = Guards(self)
        self.probe: TokenBatch | None = None  # a row of the last step

    # a method overrides these

    def check(self) -> None:
        """Checks config and arguments before the model is loaded.

        Raises:
            ValueError: the trainer cannot work with them.
        """
        check_class(self)

    @staticmethod
    def needs(method: Any) -> ModelNeeds:
        """The heads and the reference that these settings need. ``trlx plan`` calls it, too."""
        return ModelNeeds()

    logprob_temperature: float = 1.0
    """Temperature of the model's log-probabilities."""

    @abstractmethod
    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss, summed over the units of one microbatch, and its metrics."""

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets what every epoch of an offline method trains on."""
        check_rollouts_given(type(self).__name__, rollouts, self.rows_together)
        self.samples = self.store = self.store_of(rollouts)

    def collect(self) -> Store:
        """Returns what the coming epoch trains on, the same on every process."""
        return self.samples

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows that `collect` returns; None: unknown until it returns."""
        return len(self.samples)

    @property
    def rows_at_once(self) -> int:
        """Responses that a process samples at once."""
        return self.config.train.batch_size

    @property
    def rows_together(self) -> int:
        """Consecutive rows that microbatches and processes never split: the two of a pair, a group."""
        return self.unit.rows

    @property
    def data_digest(self) -> str:
        """A short hash of the data; a resume with other data warns."""
        return self.samples.digest()

    def after_step(self, metrics: dict[str, float]) -> None:
        """The loop calls it after every optimizer step, before it logs and saves."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside weights, optimizer and random numbers: nested dicts of plain values and tensors. A
        method adds its own state: ``super().state_dict() | {...}``."""
        return {
            "schedule": self.schedule.state_dict(),
            "best": [self.best_reward, self.best_step, self.best_metric],
            "guards": self.guards.memory,
            # after training the tracker is closed, and its last state holds
            "tracker": (self.tracker and self.tracker.state()) or self.tracker_state,
            "callbacks": self.callbacks.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.schedule.load_state_dict(state["schedule"])
        self.best_reward, self.best_step, self.best_metric = state["best"]
        self.guards.memory, self.tracker_state = state.get("guards", {}), state["tracker"]
        self.callbacks.load(state.get("callbacks", []))

    # users call these

    def add_eval_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts of evaluations."""
        self.evaluator = Evaluator(
            backend=self.backend,
            draw=self.draw,
            tokenizer=self.tokenizer,
            prompts=[pipeline[i] for i in range(len(pipeline))],
            variants=self.eval_variants,
            batch_size=self.rows_at_once,
            scorer=self.scorer,
            metric_fn=self.metric_fn,
            display=self.display,
        )

    def stop(self, why: str) -> None:
        """Ends training after the present step, an evaluation and a checkpoint. For callbacks, on every process."""
        self.schedule.stopped = why

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the run logged so far, one dict per step or evaluation, each with its "step"."""
        return logged(self.config.train.logging_dir or self.config.train.checkpoint_dir)

    def learn(self) -> None:
        """Trains to the end, from the start or from ``train.resume_from_checkpoint``.

        Raises:
            RewardError: reward_fn or metric_fn failed; a checkpoint is written first.
            SystemExit: with code 75 after SIGTERM or SIGUSR1; a checkpoint is written first.
            KeyboardInterrupt: after Ctrl-C; a checkpoint is written first, unless Ctrl-C came twice.
            RuntimeError, ValueError: see `trlx.run.folder.opened`.
        """
        if self.run_folder is not None and self.schedule.finished and not self.schedule.evaluation_due:
            logger.info(f"Nothing is left to learn after step {self.schedule.step}: {self.schedule.why_finished}")
            return
        with ExitStack() as stack:
            stack.enter_context(watching())
            resumed = stack.enter_context(run_folder.opened(self))
            stack.enter_context(Interrupts())
            where, state = (self.backend.data_size, self.backend.is_main), self.tracker_state if resumed else None
            self.tracker = stack.enter_context(Tracker.of(self.config, *where, state, self.watchers))
            stack.enter_context(self.publishing(resumed))
            stack.enter_context(rescuing(self))
            stack.enter_context(self.display)
            self.display.begin(self)
            self.callbacks.tell("on_start")
            if not resumed or self.schedule.evaluation_due:
                self.evaluate()
            while not self.schedule.finished:
                self._step(self._next_batch())
            self.saver.finish()
            self.callbacks.tell("on_end")
            self.display.end(self)

    def generate(self, input_ids, attention_mask=None, **gen_kwargs: Any) -> str | list[str] | Tensor:
        """Samples from the present policy.

        Args:
            input_ids: a text or chat; a list of texts, chats or id lists; or int64 [B, T] with `attention_mask`.
            gen_kwargs: change the rollouts' generation settings, e.g. ``max_new_tokens=8, do_sample=False``. If the
                config sweeps over one, choose its value here.

        Returns:
            The response to a text, or a list of the responses to texts. For tokens int64 [B, T + new]: the prompts,
            padded on the tokenizer's padding side, each followed by its response, padded on the right.
        """
        sampling = self.sampling({**self.sampling_kwargs, **gen_kwargs}, "gen_kwargs")
        return Respond(self.draw, self.tokenizer, self.backend.row_format, sampling)(input_ids, attention_mask)

    def save_pretrained(
        self, directory: str | Path | None = None, merge: bool = False, safe_serialization: bool = True
    ) -> None:
        """Writes model and tokenizer so that plain ``transformers`` loads them, and the heads in a file beside.

        If an adapter trains, it writes the adapter, or with `merge` the model with the adapter merged.

        Raises:
            ValueError: without `safe_serialization` weights would be a pickle; or `directory` is a file.
        """
        if not safe_serialization:
            raise ValueError("save_pretrained() writes safetensors only, never a pickle: leave out safe_serialization")
        self.saver.export(Path(directory or Path(self.config.train.checkpoint_dir) / "hf_model").expanduser(), merge)

    def save(self, directory: str | Path | None = None) -> None:
        """Writes a checkpoint to `directory`, and replaces the checkpoint there.

        Without `directory` it writes ``checkpoint_<step>``, and deletes old ones as ``train.keep_checkpoints`` says.

        Raises:
            ValueError: `directory` holds other things than a checkpoint.
            FloatingPointError: without `directory`, if the model's log-probabilities are no longer finite.
        """
        self.saver.begin(directory)
        self.saver.finish()

    def load(self, directory: str | Path | None = None) -> None:
        """Restores a checkpoint, by default the newest, and warns of settings that differ from its run.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is of another method or backend, or of other weights than this config trains.
        """
        under = self.config.train.checkpoint_dir
        folder = checkpoint.existing(Path(directory or checkpoint.newest(under) or under).expanduser())
        state, saved = checkpoint.read_state(folder)
        now = identity(self.config, self.backend, self.data_digest)
        for change in changes(saved, now):
            logger.warning(f"Resuming {folder} where something has changed. {change}")
        self.backend.load(folder, optimizer=keeps_averages(saved, now))
        self.store = None
        self.load_state_dict(state)
        if not self.online and saved["data"] != now["data"]:
            self.schedule.restart_epoch()
        own = f"{self.backend.data_rank:05d}"
        # with other parallel sizes this shard may not exist; then take the generators of the leading process
        randomness = RandomState.read(folder, own + self.backend.shard) or RandomState.read(folder, own)
        if randomness is not None:
            randomness.restore()
        self.saved = folder, self.schedule.step
        self.run_folder = folder.resolve().parent

    # the loop

    @property
    def total_steps(self) -> int | None:
        """The step at which training ends: by train.total_steps or train.epochs; None: unknown."""
        return self.schedule.last_step(self.rows_per_epoch)

    @property
    def sampling_kwargs(self) -> dict[str, Any]:
        """Generation settings of rollouts, or of evaluations if the method has no rollouts."""
        return self.config.method.gen_kwargs

    def sampling(self, gen_kwargs: dict[str, Any], where: str = GEN_KWARGS) -> SamplingConfig:
        """Checks generation settings, and adds this run's special tokens and stop sequences."""
        return SamplingConfig.from_kwargs(gen_kwargs, self.tokenizer, self.stopper, where)

    def draw(self, prompts: list[list[int]], sampling: SamplingConfig, begun: bool = False) -> list[Sample]:
        """Samples from the present policy, see `drawn`. Call it on every process."""
        self.backend.check_prompts(prompts, sampling.max_new_tokens)
        self.sampler.sync(self.schedule.step, self.backend.weights_by_name)
        return drawn(self.sampler, prompts, sampling, self.backend.vocab_size, begun)

    def evaluate(self) -> dict[str, float]:
        """Evaluates, logs the result, and keeps the best checkpoint. Random number generators stay as they were."""
        if self.evaluator is None:
            return {}
        step = self.schedule.step
        self.schedule.evaluation_due = True
        with own_randomness(self.config.train.seed, step, self.backend.data_rank):
            result = self.evaluator.run(step)
        self.schedule.evaluation_due = False
        if self.tracker is not None:
            self.callbacks.tell("on_evaluation", result.metrics)
            self.tracker.log(result.metrics, step)
            self.tracker.log_samples("eval", step, [dict(zip(result.columns, row, strict=True)) for row in result.rows])
            self.display.evaluation(step, result.metrics, result.columns, result.rows)
            self.saver.keep_best(*result.objective(self.best_by))
        return result.metrics

    def _next_batch(self) -> TokenBatch:
        """This process's share of the present global batch."""
        leave_if_asked(self.backend)
        if self.store is None or (not self.online and self.schedule.begins_epoch):
            self.store = self._collect()
        backend, rows = self.backend, self.schedule.rows(len(self.store))
        return shard(self.store, rows, backend.data_rank, backend.data_size, self.rows_together)

    def _collect(self) -> Store:
        """Calls `collect`. If it raises, goes back to the state before it, so that a checkpoint can be written."""
        before = RandomState.capture(), self.state_dict()
        try:
            return self.collect()
        except BaseException:
            before[0].restore()
            self.load_state_dict(before[1])
            raise

    def _step(self, batch: TokenBatch) -> None:
        """One optimizer step, and the evaluation and the checkpoint that are due after it."""
        began = time.perf_counter()
        tokens = self.store.num_tokens(self.schedule.rows(len(self.store)))
        self.at_boundary = False
        loss = self.loss if self.probe else partial(checked_loss, type(self).__name__, self.loss)
        metrics = self.guards.train_step(batch, loss)
        self.probe = batch.rows(slice(0, 1))
        if self.schedule.advance(len(self.store)) and self.online:
            self.store = None
        self.after_step(metrics)
        self.at_boundary = True
        self.guards.count(metrics)
        measured = {"time/step": time.perf_counter() - began, **self.display.speed(tokens), **self.backend.memory()}
        metrics, self.pending = metrics | self.pending | measured, {}
        self.callbacks.tell("on_step", metrics)
        self.tracker.log(metrics, self.schedule.step)
        self.display.step(metrics)
        train, step = self.config.train, self.schedule.step
        if self.schedule.finished or step % train.eval_interval == 0:
            self.evaluate()
        is_due = step % (train.checkpoint_interval or train.eval_interval) == 0
        if self.schedule.finished or (is_due and not self.guards.in_a_row):
            # the best checkpoint may be of this very state
            self.begin_to_save(like=self.saver.best if train.save_best and self.best_step == step else None)

    def begin_to_save(self, *directory: Path, like: Path | None = None) -> None:
        """Starts to write a checkpoint, see `Saver.begin`, or calls the `save` of a subclass, which may do more."""
        plain = getattr(self.save, "__func__", None) is Trainer.save
        self.saver.begin(*directory, like=like) if plain else self.save(*directory)
