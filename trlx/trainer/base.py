"""The training loop, the same for every algorithm and backend."""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trlx import checkpoint, logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.backends.distress import watching
from trlx.batch import TokenBatch, TokenOutputs
from trlx.checkpoint import RandomState, TrainerState, own_randomness, seed_everything
from trlx.compat.attributes import OldNames
from trlx.compat.hooks import check_hooks
from trlx.config import TRLConfig
from trlx.data.prompts import PromptPipeline
from trlx.data.store import Store, pass_order, shard
from trlx.methods.masked import Metrics
from trlx.models.source import tokenizer_for
from trlx.rewards.scoring import Scorer
from trlx.run import folder as run_folder
from trlx.run.display import Display
from trlx.run.failures import rescuing
from trlx.run.guards import Interrupts, SkippedSteps, leave_if_asked
from trlx.sampling.settings import GEN_KWARGS, SamplingConfig, one_setting, sweep_variants
from trlx.sampling.stopping import Stopper
from trlx.tracking import Tracker, default_run_name
from trlx.trainer.evaluate import Evaluator
from trlx.trainer.saving import check_weights, make_folder, read_run, write_run
from trlx.trainer.sequences import sample
from trlx.trainer.together import on_main

logger = logging.get_logger(__name__)

OURS = ("config", "reward_fn", "metric_fn", "stop_sequences")
"""Arguments of a trainer that `trlx.train` passes; any others are ``train.trainer_kwargs``."""
MANY_STEPS = 999_999
"""How wide the numbers of checkpoints are made where nobody knows how many steps a run has."""


class Trainer(OldNames, ABC):
    """A method on a backend. Subclasses say what an epoch trains on (`collect`) and what the loss is (`loss`)."""

    backend_class: ClassVar[type[Backend]]
    online: ClassVar[bool]
    """True: trains on its own samples, scored by reward_fn. False: trains on samples it is given."""
    rewarded: ClassVar[bool] = False
    """Whether each sample it is given comes with a reward."""

    def __init__(self, config: TRLConfig, reward_fn=None, metric_fn=None, stop_sequences=None):
        check_hooks("trainer", type(self))
        check_hooks("method", type(config.method))
        config.check()
        self.config = config
        self.reward_fn = reward_fn
        self.metric_fn = metric_fn
        self.backend_class.check_source(config.model, config.train)
        source = self.backend_class.source(config.model, config.train)
        self.tokenizer = tokenizer_for(source, config.tokenizer, config.model.model_extra_configs)
        self.stopper = Stopper(self.tokenizer, stop_sequences) if stop_sequences else None
        self.eval_variants = [
            (name, self.sampling(kwargs)) for name, kwargs in sweep_variants(config.method.gen_kwargs)
        ]
        self.backend = self.backend_class(
            model=config.model,
            optimizer=config.optimizer,
            scheduler=config.scheduler,
            train=config.train,
            tokenizer=self.tokenizer,
            needs=self.needs(),
        )
        for _, sampling in self.eval_variants:
            self.backend.check_sampling(sampling)
        seed_everything(config.train.seed + self.backend.data_rank)
        self.state = TrainerState()
        self.store: Store | None = None
        self.scorer: Scorer | None = None
        if reward_fn is not None:
            separator = self.backend.row_format.separator
            self.scorer = Scorer(reward_fn, self.tokenizer, config.train.reward_timeout, separator)
        self.evaluator: Evaluator | None = None
        self.tracker: Tracker | None = None
        self.run_folder: Path | None = None
        """The folder of the run that this trainer goes on; None: it starts one."""
        self.display = Display(self.backend.is_main)
        self.pending: dict[str, float] = {}  # what collect() measured, logged with the next step
        self.saved: tuple[Path, int] | None = None  # the last checkpoint to resume from, and its step
        self.at_boundary = True  # between steps, where what is saved can be resumed from
        self.skipped = SkippedSteps()
        self._probe: TokenBatch | None = None  # a row of the last step

    # what a method says

    @staticmethod
    def model_needs(method: Any) -> ModelNeeds:
        """What the method asks of the model, by its settings alone, as ``trlx plan`` asks; `needs` may add to it."""
        return ModelNeeds()

    def needs(self) -> ModelNeeds:
        return self.model_needs(self.config.method)

    @abstractmethod
    def collect(self) -> Store:
        """What the coming epoch trains on, the same on every process. Changes no state if it raises."""

    @abstractmethod
    def loss(self, scores: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss summed over the response tokens of one microbatch, and its metrics."""

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int | None:
        """Rows that `collect` returns; None where that shows only when it does."""

    @property
    @abstractmethod
    def data_digest(self) -> str:
        """A short hash of the data, to recognise a resume on other data."""

    inner_epochs: int = 1
    """Passes over what `collect` returns."""
    eval_batch_size: int | None = None
    """Prompts per generation at evaluation; None: train.batch_size."""

    def method_state(self) -> dict[str, Any]:
        """The method's own numbers for a checkpoint."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restores `method_state`."""

    def write_rollouts(self, folder: Path) -> None:
        """Adds the rollouts in hand to a checkpoint; called on the main process."""
        if self.online and isinstance(self.store, TokenBatch):
            checkpoint.write_rollouts(folder, self.store)

    def read_rollouts(self, folder: Path) -> None:
        """Restores what `write_rollouts` wrote; the state is restored already."""
        self.store = checkpoint.read_rollouts(folder) if self.online else None

    def after_step(self, metrics: dict[str, float]) -> None:
        """Called after every optimizer step, before anything is logged or saved."""

    # what the user calls

    def add_eval_pipeline(self, pipeline: PromptPipeline) -> None:
        """Sets the prompts of evaluations."""
        self.evaluator = Evaluator(
            backend=self.backend,
            tokenizer=self.tokenizer,
            prompts=[pipeline[i] for i in range(len(pipeline))],
            variants=self.eval_variants,
            batch_size=self.eval_batch_size or self.config.train.batch_size,
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
            RuntimeError, ValueError: see `run_folder.opened`.
        """
        if self.run_folder is not None and self.finished and not self.state.evaluation_due:
            logger.info(f"Nothing is left to learn: train.total_steps or train.epochs end at step {self.state.step}")
            return
        with ExitStack() as stack:
            stack.enter_context(watching())
            resumed = stack.enter_context(run_folder.opened(self))
            stack.enter_context(Interrupts())
            self.tracker = stack.enter_context(self._open_tracker(resumed))
            stack.enter_context(rescuing(self))
            stack.enter_context(self.display)
            self.display.begin(self)
            if not resumed or self.state.evaluation_due:
                self.evaluate()
            for batch in self._batches():
                self._step(batch)
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
        return sample(self.backend, self.tokenizer, sampling, input_ids, attention_mask)

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
        on_main(self.backend, lambda: make_folder(folder))
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
        self.state.method = self.method_state()
        # after training the tracker is closed, and what the last checkpoint said of it still holds
        self.state.tracker = (self.tracker and self.tracker.state()) or self.state.tracker
        steps = self.config.train.total_steps
        digits = len(str(self.total_steps or MANY_STEPS if steps is None else steps))
        own = Path(self.config.train.checkpoint_dir) / f"checkpoint_{self.state.step:0{digits}d}"
        write_run(self, Path(directory or own).expanduser())
        if directory is None:
            self.saved = own, self.state.step
            run_folder.rotate(own, self.config.train, self.backend.is_main)

    def load(self, directory: str | Path | None = None) -> None:
        """Restores everything `save` wrote, by default the newest; says what differs from the run that wrote it.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it holds other weights than this config trains.
        """
        under = self.config.train.checkpoint_dir
        folder = Path(directory or checkpoint.newest(under) or under).expanduser()
        read_run(self, folder)
        self.saved = folder, self.state.step
        self.run_folder = folder.resolve().parent

    # the loop

    @property
    def total_steps(self) -> int | None:
        """train.total_steps, or fewer where train.epochs is known to end first; None where neither is known."""
        train = self.config.train
        if self.rows_per_epoch is None:
            return train.total_steps
        of_epochs = train.epochs * self.inner_epochs * -(-self.rows_per_epoch // self._global_batch_size)
        return of_epochs if train.total_steps is None else min(train.total_steps, of_epochs)

    @property
    def finished(self) -> bool:
        """Whether train.total_steps or train.epochs are done."""
        steps, epochs = self.config.train.total_steps, self.config.train.epochs
        return self.state.epoch >= epochs or (steps is not None and self.state.step >= steps)

    @property
    def sampling_kwargs(self) -> dict[str, Any]:
        """Generation settings of rollouts; of evaluations where the method has none."""
        return self.config.method.gen_kwargs

    def sampling(self, gen_kwargs: dict[str, Any], where: str = GEN_KWARGS) -> SamplingConfig:
        """Generation settings, checked and completed with this run's tokens and stop sequences."""
        return SamplingConfig.from_kwargs(gen_kwargs, self.tokenizer, self.stopper, where)

    def evaluate(self) -> dict[str, float]:
        """Evaluates now, logs the result, keeps the best checkpoint. Random number generators stay as they were."""
        if self.evaluator is None:
            return {}
        self.state.evaluation_due = True
        with own_randomness(_mixed(self.config.train.seed, self.state.step, self.backend.data_rank)):
            result = self.evaluator.run(self.state.step)
        self.state.evaluation_due = False
        if self.tracker is not None:
            self.tracker.log(result.metrics, self.state.step)
            samples = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
            self.tracker.log_samples("eval", self.state.step, samples)
            self.tracker.log_table("samples", result.columns, result.rows, self.state.step)
            self.display.evaluation(self.state.step, result.metrics, result.columns, result.rows)
            self._keep_best(result.objective)
        return result.metrics

    @property
    def _global_batch_size(self) -> int:
        return self.config.train.batch_size * self.backend.data_size

    def _batches(self) -> Iterator[TokenBatch]:
        """This process's part of every global batch from the present position to the end of training."""
        while not self.finished:
            leave_if_asked(self.backend)
            # an online trainer may have rollouts from a checkpoint, an offline one has had its samples from the start
            begins = not self.online and (self.state.inner_epoch, self.state.rows_done) == (0, 0)
            if self.store is None or begins:
                self.store = self._collect()
            yield shard(self.store, self._rows(), self.backend.data_rank, self.backend.data_size)

    def _rows(self) -> list[int]:
        """The row numbers of the present global batch."""
        order, done = pass_order(len(self.store), self.config.train.seed, self.state.passes), self.state.rows_done
        return list(order[done : done + self._global_batch_size])

    def _collect(self) -> Store:
        """`collect`; if it ends early, random numbers go back to where they were: a checkpoint can be written."""
        before = RandomState.capture(), self.method_state()
        try:
            return self.collect()
        except BaseException:
            before[0].restore()
            self.load_method_state(before[1])
            raise

    def _step(self, batch: TokenBatch) -> None:
        """One optimizer step and everything due after it. At its end the run is at a boundary it can resume from."""
        began = time.perf_counter()
        tokens = self.store.num_tokens(self._rows())
        self.at_boundary = False
        metrics = self.backend.train_step(batch, self.loss)
        self._probe = batch.rows(slice(0, 1))
        self._advance()
        self.after_step(metrics)
        self.at_boundary = True
        self.skipped.count(metrics, self.state)
        metrics |= {**self.pending, "time/step": time.perf_counter() - began}
        metrics["time/tokens_per_second"] = self.display.tokens_per_second(tokens)
        self.pending = {}
        self.tracker.log(metrics, self.state.step)
        self.display.step(metrics)
        train, is_last = self.config.train, self.finished
        if is_last or self.state.step % train.eval_interval == 0:
            self.evaluate()
        is_due = self.state.step % (train.checkpoint_interval or train.eval_interval) == 0
        if is_last or (is_due and not self.skipped.in_a_row):
            self.save()

    def _advance(self) -> None:
        """Moves the position past the batch just done."""
        self.state.step += 1
        self.state.rows_done += self._global_batch_size
        self.settle()

    def settle(self) -> None:
        """Moves the position over the ends of a pass and an epoch, if they are reached."""
        state = self.state
        if state.rows_done >= len(self.store):
            state.rows_done, state.inner_epoch, state.passes = 0, state.inner_epoch + 1, state.passes + 1
        if state.inner_epoch >= self.inner_epochs:
            state.rows_done, state.inner_epoch, state.epoch = 0, 0, state.epoch + 1
            self.store = None if self.online else self.store

    def _keep_best(self, objective: float | None) -> None:
        best = self.state.best_reward
        if objective is None or not math.isfinite(objective) or (best is not None and objective <= best):
            return
        self.state.best_reward, self.state.best_step = objective, self.state.step
        if self.config.train.save_best:
            self.save(Path(self.config.train.checkpoint_dir) / run_folder.BEST)

    # starting

    def _open_tracker(self, resumed: bool) -> Tracker:
        train = self.config.train
        name = train.run_name or default_run_name(self.config.to_json()["model"]["model_path"], self.backend.data_size)
        return Tracker(
            train.tracker,
            Path(train.logging_dir or train.checkpoint_dir),
            project=train.project_name,
            run_name=name,
            group=train.group_name,
            entity=train.entity_name,
            tags=train.tags,
            config=self.config.to_json(),
            is_main=self.backend.is_main,
            state=self.state.tracker if resumed else None,
        )


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, far from the seeds made of neighbouring ones."""
    return random.Random(repr(numbers)).getrandbits(31)
