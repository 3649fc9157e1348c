"""The training loop, the same for every algorithm and backend."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trlx import checkpoint, logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.backends.distress import watching
from trlx.batch import Rollout, Sample, TokenBatch, TokenOutputs
from trlx.checkpoint import RandomState, own_randomness, seed_everything
from trlx.compat.attributes import OldNames
from trlx.compat.hooks import check_hooks
from trlx.config import TRLConfig
from trlx.data.prompts import PromptPipeline
from trlx.data.store import RolloutStore, Store, shard
from trlx.method_configs import MethodConfig
from trlx.methods.masked import Metrics
from trlx.methods.units import Unit
from trlx.models.source import tokenizer_for
from trlx.rewards.scoring import Scorer
from trlx.run import folder as run_folder
from trlx.run.changes import changes, identity, keeps_averages
from trlx.run.display import Display
from trlx.run.failures import rescuing
from trlx.run.guards import Interrupts, SkippedSteps, check_weights, leave_if_asked
from trlx.sampling.base import sampler_for
from trlx.sampling.settings import GEN_KWARGS, SamplingConfig, one_setting, sweep_variants
from trlx.sampling.stopping import Stopper
from trlx.sampling.texts import Respond
from trlx.tracking import Tracker
from trlx.trainer.evaluate import Evaluator
from trlx.trainer.schedule import Schedule, check_blocks

logger = logging.get_logger(__name__)

OURS = ("config", "reward_fn", "metric_fn", "stop_sequences")
"""Arguments of a trainer that `trlx.train` passes; any others are ``train.trainer_kwargs``."""


class Trainer(OldNames, ABC):
    """A method on a backend. Subclasses say what the model needs (`needs`), what an epoch trains on (`learn_from`, or
    `collect`) and what the loss is (`loss`)."""

    backend_class: ClassVar[type[Backend]]
    method_class: ClassVar[type[MethodConfig]] = MethodConfig
    """What the method section of the config must be."""
    online: ClassVar[bool] = False
    """True: trains on its own samples, scored by reward_fn. False: trains on samples it is given."""
    rewarded: ClassVar[bool] = False
    """Whether each sample it is given comes with a reward."""
    unit: Unit = Unit.TOKEN
    """What `loss` sums over, and the backend divides by the number of."""
    passes_per_epoch: int = 1
    """Passes over what `collect` returns."""

    def __init__(self, config: TRLConfig, reward_fn=None, metric_fn=None, stop_sequences=None):
        check_hooks("trainer", type(self))
        check_hooks("method", type(config.method))
        config.check()
        self.config = config
        self.method = config.method
        self.reward_fn = reward_fn
        self.metric_fn = metric_fn
        self.check()
        self.backend_class.check_source(config.model, config.train)
        source = self.backend_class.source(config.model, config.train)
        self.tokenizer = tokenizer_for(source, config.tokenizer, config.model.model_extra_configs)
        self.stopper = Stopper(self.tokenizer, stop_sequences) if stop_sequences else None
        self.eval_variants = [
            (name, self.sampling(kwargs)) for name, kwargs in sweep_variants(config.method.gen_kwargs)
        ]
        self.model_needs = replace(self.needs(self.method), temperature=self.logprob_temperature)
        self.backend = self.backend_class(
            model=config.model,
            optimizer=config.optimizer,
            scheduler=config.scheduler,
            train=config.train,
            tokenizer=self.tokenizer,
            needs=self.model_needs,
        )
        self.sampler = sampler_for(config.train.sampler, self.backend, self.tokenizer)
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
        self.display = Display(self.backend.is_main)
        self.run_folder: Path | None = None
        """The folder of the run that this trainer goes on; None: it starts one."""
        self.pending: dict[str, float] = {}  # what collect() measured, logged with the next step
        self.saved: tuple[Path, int] | None = None  # the last checkpoint to resume from, and its step
        self.at_boundary = True  # between steps, where what is saved can be resumed from
        self.best_reward: float | None = None
        self.best_step: int | None = None
        self.tracker_state: dict[str, Any] = {}
        self.skipped = SkippedSteps()
        self._probe: TokenBatch | None = None  # a row of the last step

    # what a method says

    def check(self) -> None:
        """Makes sure, before a model is loaded, that this trainer can do what it was given.

        Raises:
            ValueError: it cannot.
        """
        if not isinstance(self.method, self.method_class):
            wanted = f"method.name {self.method_class.__name__}"
            raise ValueError(f"{type(self).__name__} needs {wanted}, got {self.method.name}")

    @staticmethod
    def needs(method: Any) -> ModelNeeds:
        """What a method with these settings asks of the model. ``trlx plan`` asks, too, and has no trainer."""
        return ModelNeeds()

    logprob_temperature: float = 1.0
    """The model's log-probabilities are of this temperature."""

    @abstractmethod
    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss summed over the units of one microbatch, and its metrics."""

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets what every epoch trains on; for methods that learn from samples they are given."""
        self.samples = self.store = RolloutStore(rollouts, self.tokenizer.pad_token_id, self.backend.row_format)

    def collect(self) -> Store:
        """What the coming epoch trains on, the same on every process. Changes no state if it raises."""
        return self.samples

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows that `collect` returns; None where that shows only when it does."""
        return len(self.samples)

    @property
    def rows_at_once(self) -> int:
        """Responses that a process generates at once."""
        return self.config.train.batch_size

    @property
    def rows_together(self) -> int:
        """Consecutive rows that are never split over microbatches or processes: the two of a pair, a group."""
        return self.unit.rows

    @property
    def data_digest(self) -> str:
        """A short hash of the data, to recognise a resume on other data."""
        return self.samples.digest()

    def after_step(self, metrics: dict[str, float]) -> None:
        """Called after every optimizer step, before anything is logged or saved."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and random numbers: nested dicts of numbers, texts, lists
        and tensors. A method with a state of its own adds it: ``super().state_dict() | {...}``."""
        return {
            "schedule": self.schedule.state_dict(),
            "best": [self.best_reward, self.best_step],
            "skipped_steps": self.skipped.total,
            # after training the tracker is closed, and what it said last still holds
            "tracker": (self.tracker and self.tracker.state()) or self.tracker_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.schedule.load_state_dict(state["schedule"])
        self.best_reward, self.best_step = state["best"]
        self.skipped.total, self.tracker_state = state["skipped_steps"], state["tracker"]

    # what the user calls

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

    def learn(self) -> None:
        """Trains to the end, from the start or from ``train.resume_from_checkpoint``.

        Raises:
            RewardError: reward_fn or metric_fn failed; what was trained so far is checkpointed first.
            SystemExit: with code 75 after SIGTERM or SIGUSR1, once a checkpoint is written.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; at once after a second one.
            RuntimeError, ValueError: see `trlx.run.folder.opened`.
        """
        if self.run_folder is not None and self.schedule.finished and not self.schedule.evaluation_due:
            logger.info(f"Nothing is left to learn: train.total_steps or train.epochs end at step {self.schedule.step}")
            return
        with ExitStack() as stack:
            stack.enter_context(watching())
            resumed = stack.enter_context(run_folder.opened(self))
            stack.enter_context(Interrupts())
            where, state = (self.backend.data_size, self.backend.is_main), self.tracker_state if resumed else None
            self.tracker = stack.enter_context(Tracker.of(self.config, *where, state))
            stack.enter_context(rescuing(self))
            stack.enter_context(self.display)
            self.display.begin(self)
            if not resumed or self.schedule.evaluation_due:
                self.evaluate()
            while not self.schedule.finished:
                self._step(self._next_batch())
            self.display.end(self)

    def generate(self, input_ids, attention_mask=None, **gen_kwargs: Any) -> str | list[str] | Tensor:
        """Samples from the policy as it is now.

        Args:
            input_ids: a text or chat, or a list of them; or tokens, int64 [B, T] (padding marked by `attention_mask`),
                or a list of id lists.
            gen_kwargs: changes to the rollouts' generation settings, e.g. ``max_new_tokens=8, do_sample=False``. Where
                the config sweeps over one, it is to be chosen here.

        Returns:
            For a text its response, for a list of texts theirs. For tokens int64 [B, T + new]: the prompts, padded on
            the tokenizer's padding side, each followed by its response, padded on the right.
        """
        sampling = self.sampling(one_setting({**self.sampling_kwargs, **gen_kwargs}), "gen_kwargs")
        return Respond(self.draw, self.tokenizer, self.backend.row_format, sampling)(input_ids, attention_mask)

    def save_pretrained(
        self, directory: str | Path | None = None, merge: bool = False, safe_serialization: bool = True
    ) -> None:
        """Writes model and tokenizer so that plain ``transformers`` loads them; heads in a file of their own beside.

        Where an adapter trains it is the adapter that is written, or with `merge` the model with the adapter folded in.

        Raises:
            ValueError: without `safe_serialization` weights would be a pickle; or `directory` is a file.
        """
        if not safe_serialization:
            raise ValueError("save_pretrained() writes safetensors only, never a pickle: leave out safe_serialization")
        folder = Path(directory or Path(self.config.train.checkpoint_dir) / "hf_model").expanduser()
        self.backend.on_main(lambda: checkpoint.make_folder(folder))
        (self.backend.export_merged if merge else self.backend.export_hf)(folder)
        self.backend.barrier()

    def save(self, directory: str | Path | None = None) -> None:
        """Writes a checkpoint to `directory`, replacing the one there; by default ``checkpoint_<step>``.

        In the latter case old ones are deleted as ``train.keep_checkpoints`` says.

        Raises:
            ValueError: `directory` holds other things than a checkpoint.
            FloatingPointError: without `directory`, where the model's log-probabilities are no longer finite.
        """
        if directory is None and self._probe is not None:
            check_weights(self.backend, self._probe)
        train, backend, step = self.config.train, self.backend, self.schedule.step
        own = run_folder.place(train, step, self.total_steps)
        target = Path(directory or own).expanduser()
        backend.on_main(lambda: checkpoint.check_replaceable(target))
        with checkpoint.replacing(target, backend.is_main, backend.barrier) as folder:
            backend.save(folder, optimizer=train.save_optimizer)
            RandomState.capture().write(folder, f"{backend.data_rank:05d}{backend.shard}")
            if backend.is_main:
                checkpoint.write_state(folder, self.state_dict(), identity(self.config, self.backend, self.data_digest))
            self.save_pretrained(folder / "hf_model")
        if directory is None:
            self.saved = own, step
            run_folder.rotate(own, train, backend.is_main)

    def load(self, directory: str | Path | None = None) -> None:
        """Restores everything `save` wrote, by default the newest; says what differs from the run that wrote it.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is of another method or backend, or holds other weights than this config trains.
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
        # with other parallel sizes there may be no such shard; then what the leading process drew goes on here
        randomness = RandomState.read(folder, own + self.backend.shard) or RandomState.read(folder, own)
        if randomness is not None:
            randomness.restore()
        self.saved = folder, self.schedule.step
        self.run_folder = folder.resolve().parent

    # the loop

    @property
    def total_steps(self) -> int | None:
        """train.total_steps, or fewer where train.epochs is known to end first; None where neither is known."""
        return self.schedule.last_step(self.rows_per_epoch)

    @property
    def sampling_kwargs(self) -> dict[str, Any]:
        """Generation settings of rollouts; of evaluations where the method has none."""
        return self.config.method.gen_kwargs

    def sampling(self, gen_kwargs: dict[str, Any], where: str = GEN_KWARGS) -> SamplingConfig:
        """Generation settings, checked and completed with this run's tokens and stop sequences."""
        return SamplingConfig.from_kwargs(gen_kwargs, self.tokenizer, self.stopper, where)

    def draw(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """Samples from the policy as it is now, see `Sampler.generate`. Called on every process."""
        self.backend.check_prompts(prompts, sampling.max_new_tokens)
        self.sampler.sync(self.schedule.step, self.backend.weights_by_name)
        return self.sampler.generate(prompts, sampling)

    def evaluate(self) -> dict[str, float]:
        """Evaluates now, logs the result, keeps the best checkpoint. Random number generators stay as they were."""
        if self.evaluator is None:
            return {}
        step = self.schedule.step
        self.schedule.evaluation_due = True
        with own_randomness(self.config.train.seed, step, self.backend.data_rank):
            result = self.evaluator.run(step)
        self.schedule.evaluation_due = False
        if self.tracker is not None:
            self.tracker.log(result.metrics, step)
            samples = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
            self.tracker.log_samples("eval", step, samples)
            self.tracker.log_table("samples", result.columns, result.rows, step)
            self.display.evaluation(step, result.metrics, result.columns, result.rows)
            self._keep_best(result.objective)
        return result.metrics

    def _next_batch(self) -> TokenBatch:
        """This process's share of the present global batch."""
        leave_if_asked(self.backend)
        if self.store is None or (not self.online and self.schedule.begins_epoch):
            self.store = self._collect()
        backend, rows = self.backend, self.schedule.rows(len(self.store))
        return shard(self.store, rows, backend.data_rank, backend.data_size, self.rows_together)

    def _collect(self) -> Store:
        """`collect`; if it ends early, random numbers go back to where they were: a checkpoint can be written."""
        before = RandomState.capture(), self.state_dict()
        try:
            return self.collect()
        except BaseException:
            before[0].restore()
            self.load_state_dict(before[1])
            raise

    def _step(self, batch: TokenBatch) -> None:
        """One optimizer step and everything due after it. At its end the run is at a boundary it can resume from."""
        began = time.perf_counter()
        tokens = self.store.num_tokens(self.schedule.rows(len(self.store)))
        self.at_boundary = False
        metrics = self.backend.train_step(batch, self.loss, self.unit)
        self._probe = batch.rows(slice(0, 1))
        if self.schedule.advance(len(self.store)) and self.online:
            self.store = None
        self.after_step(metrics)
        self.at_boundary = True
        self.skipped.count(metrics, self.schedule.step)
        metrics |= {**self.pending, "time/step": time.perf_counter() - began}
        metrics["time/tokens_per_second"] = self.display.tokens_per_second(tokens)
        self.pending = {}
        self.tracker.log(metrics, self.schedule.step)
        self.display.step(metrics)
        train, step, is_last = self.config.train, self.schedule.step, self.schedule.finished
        if is_last or step % train.eval_interval == 0:
            self.evaluate()
        is_due = step % (train.checkpoint_interval or train.eval_interval) == 0
        if is_last or (is_due and not self.skipped.in_a_row):
            self.save()

    def _keep_best(self, objective: float | None) -> None:
        best = self.best_reward
        if objective is None or not math.isfinite(objective) or (best is not None and objective <= best):
            return
        self.best_reward, self.best_step = objective, self.schedule.step
        if self.config.train.save_best:
            self.save(Path(self.config.train.checkpoint_dir) / run_folder.BEST)
