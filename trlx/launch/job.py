"""``trlx train``: what its options say, as the arguments of `trlx.train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from trlx.config import TRLConfig
from trlx.data.rows import PREFERENCES, check_columns, common_method, sample_list
from trlx.launch.settings import settings_of
from trlx.launch.sources import function_of, read_rows, with_prompts
from trlx.logging import is_main_process
from trlx.presets import METHODS

TINY = "tiny"
"""The model that is made in code."""
PAIRED = {"DPOConfig": "dpo", "RewardConfig": "dpo", "KTOConfig": "kto"}
"""By method, the key of `PREFERENCES` with the columns that it needs."""


@dataclass
class Job:
    """What was typed; the fields are the options of the command."""

    command: str
    """train, or the preset of a method."""
    settings: list[str] = field(default_factory=list)
    model: str | None = None
    tokenizer: str | None = None
    prompts: str | None = None
    samples: str | None = None
    reward: str | None = None
    metric: str | None = None
    eval_prompts: str | None = None
    eval_samples: str | None = None
    column: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    out: str | None = None
    resume: bool = False

    def words(self) -> list[str]:
        """The command line of this job, without the program."""
        return [self.command, *self.settings, *option_words(self, 2)]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `trlx.train`, checked; nothing is built, and no weights are read.

        Raises:
            ValueError, TypeError, OSError, ImportError: what was typed, or a file, is wrong.
        """
        from trlx.api import checked, trainers

        made = "made" if self.model == TINY else None
        samples = self._rows(self.samples) if self.samples not in (None, "made") else None
        config = self._config(samples)
        trainer = trainers.get(config.train.trainer)
        given = {"config": config, "stop_sequences": self.stop}
        if trainer.online:
            self._refuse("learns from its own samples", "samples", "eval_samples")
            self.prompts, self.reward = self.prompts or made, self.reward or made
            self._need("learns from rewards of its own samples", "prompts", "reward")
            given |= {"prompts": self._prompts(self.prompts), "reward_fn": function_of(self.reward, "--reward")}
        else:
            self._refuse("learns from samples", "prompts", "reward")
            self.samples = self.samples or made
            self._need("learns from samples", "samples")
            given |= self._offline(samples or self._rows(self.samples, config), config, trainer.rewarded)
        if self.metric:
            given["metric_fn"] = function_of(self.metric, "--metric")
        if self.eval_prompts:
            given["eval_prompts"] = self._prompts(self.eval_prompts)
        if self.eval_samples:
            given["eval_samples"] = _samples(self._rows(self.eval_samples, config), config, self.eval_samples)
        checked(**{name: value for name, value in given.items() if name not in ("metric_fn", "stop_sequences")})
        trainer.backend_class.check_source(config.model, config.train)
        return given

    def _config(self, samples: list[Any] | None) -> TRLConfig:
        from trlx.launch.made import QUICK, with_tiny_model

        words = self.settings if self.command == "train" else [self.command, *self.settings]
        is_rewarded = bool(samples) and isinstance(samples[0], dict) and "reward" in samples[0]
        guess = "ilql" if is_rewarded else common_method(samples or [])
        guess = guess if self.samples and not self.reward else "ppo"
        config = settings_of(words, self.typed(), QUICK if self.model == TINY else {}, guess).config
        method = config.method.name.lower().removesuffix("config")
        if self.command in METHODS and method in METHODS and method != self.command:
            raise ValueError(f"The settings are of {config.method.name}, another method: write trlx {method}")
        if self.tokenizer and self.model == TINY:
            raise ValueError(f"--model {TINY} has a tokenizer of its own: leave out --tokenizer")
        return with_tiny_model(config)

    def typed(self) -> dict[str, Any]:
        """The settings that options stand for, by dotted key."""
        typed = {"model.model_path": self.model, "train.checkpoint_dir": self.out}
        typed |= {"train.resume_from_checkpoint": "auto" if self.resume else None}
        typed = {key: value for key, value in typed.items() if value is not None}
        if self.model or self.tokenizer:  # another model has another tokenizer than a preset names
            typed["tokenizer.tokenizer_path"] = self.tokenizer
        return typed

    def _refuse(self, why: str, *options: str) -> None:
        for name in options:
            if getattr(self, name) is not None:
                raise ValueError(f"The method {why}: leave out --{name.replace('_', '-')}")

    def _need(self, why: str, *options: str) -> None:
        missing = [f"--{name}" for name in options if getattr(self, name) is None]
        if missing:
            raise ValueError(f"The method {why}: add {' and '.join(missing)}, or try it with --model {TINY}")

    def _rows(self, source: str, config: TRLConfig | None = None) -> list[Any]:
        from trlx.launch import made

        method = config.method.name.lower().removesuffix("config") if config else ""
        return read_rows(source, self.column, lambda: made.rows(method))

    def _prompts(self, source: str) -> list[Any]:
        return with_prompts(self._rows(source), source)

    def _offline(self, rows: list[Any], config: TRLConfig, rewarded: bool) -> dict[str, Any]:
        if not rewarded:
            return {"samples": _samples(rows, config, self.samples)}
        check_columns(rows, ["reward"], ", its number (--column reward=NAME)")
        return {"samples": _samples(rows, config, self.samples), "rewards": [row["reward"] for row in rows]}


def _samples(rows: list[Any], config: TRLConfig, source: str) -> list[Any]:
    """The rows, if the method can read their columns."""
    try:
        if config.method.name in PAIRED:
            check_columns(rows, PREFERENCES[PAIRED[config.method.name]])
        else:
            sample_list(rows)
    except ValueError as error:
        raise ValueError(f"{source}: {error}. --column KEY=NAME renames a column") from None
    return rows


def description(job: Job, arguments: dict[str, Any], processes: int) -> Iterator[str]:
    """What a job would do, in lines."""
    config = arguments["config"]
    train, rows = config.train, processes * config.train.batch_size
    steps = f"{train.total_steps} steps at most" if train.total_steps else f"{train.epochs} epochs"
    yield f"{'method':<13} {config.method.name} in {train.trainer}, {processes} process{'es' * (processes > 1)}"
    yield f"{'model':<13} {job.model or config.model.model_path}"
    for name in ("prompts", "samples", "eval_prompts", "eval_samples"):
        if name in arguments:
            first = repr(arguments[name][0])
            yield f"{name:<13} {len(arguments[name])} from {getattr(job, name)}, first {first[:80]}"
    for name in ("reward", "metric"):
        if getattr(job, name):
            yield f"{name:<13} {getattr(job, name)}"
    yield f"{'training':<13} {rows} rows a step, {steps}, evaluated every {train.eval_interval}"
    yield f"{'writes to':<13} {train.checkpoint_dir}"


def option_words(options: Any, first: int) -> list[str]:
    """The fields of a dataclass, from number `first` on, as options of a command line; None and False are left out."""
    words = []
    for option in fields(options)[first:]:
        name, value = f"--{option.name.replace('_', '-')}", getattr(options, option.name)
        if isinstance(value, bool):
            words += [name] * value
        else:
            values = value if isinstance(value, list) else [value] * (value is not None)
            words += [word for each in values for word in (name, str(each))]
    return words


def torchrun(job: Any, processes: int) -> list[str]:
    """The command that runs a job, which has `words`, in several processes of this machine."""
    here = ["--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "trlx.backends.torchrun", *here, "-m", "trlx", *job.words()]


def check_processes(count: int | None) -> None:
    """Raises ValueError if ``--processes`` is less than 1."""
    if count is not None and count < 1:
        raise ValueError(f"--processes must be at least 1, got {count}")


def become(command: list[str]) -> None:
    """Runs a command in place of this process, so that signals reach it and its exit code reaches the shell."""
    sys.stdout.flush()
    os.execv(command[0], command)


def run(job: Job, processes: int | None = None, dry_run: bool = False) -> int:
    """Checks a job, then trains, or says what it would do; returns an exit status.

    Raises:
        ValueError, TypeError, OSError, ImportError: see `Job.arguments`.
        Others: training failed.
    """
    check_processes(processes)
    arguments = job.arguments()
    command = torchrun(job, processes) if (processes or 1) > 1 else None
    if dry_run:
        print(*description(job, arguments, processes or 1), sep="\n")
        if command:
            print(f"{'starts':<13} {' '.join(command[1:])}")
        return 0
    if command:
        become(command)
    return _train(arguments)


def _train(arguments: dict[str, Any]) -> int:
    import trlx

    try:
        trlx.train(**arguments)
    except KeyboardInterrupt as stopped:
        if is_main_process():
            print(*getattr(stopped, "__notes__", ["Stopped"]), sep="\n", file=sys.stderr)
        return 130
    return 0
