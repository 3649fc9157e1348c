"""``trlx check``: what a run would stumble over, found without its weights and before it starts."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trlx import checkpoint
from trlx.api import feed
from trlx.backends.optimizer import check_settings
from trlx.config import TRLConfig
from trlx.data.chat import chat_prompt
from trlx.data.store import RolloutStore
from trlx.launch.failures import sentence
from trlx.launch.job import Job
from trlx.launch.paper import on_paper
from trlx.launch.plan.parameters import parameters, total_parameters
from trlx.launch.plan.phases import peak
from trlx.launch.plan.run import GPT2_VOCABULARY, Run
from trlx.launch.plan.tables import Planner, division_of
from trlx.model_presets import Layout, known_shape
from trlx.registry import pipelines, trainers
from trlx.run import folder as run_folder
from trlx.run.changes import changes, identity
from trlx.run.checks import GIB, Finding, checkpoint_size, disk, versions
from trlx.strict import ConfigError
from trlx.trainer.base import Trainer

COUNTED = 10_000
"""The most rows whose tokens are counted."""
SCORED = 4
"""Prompts whose samples are scored."""
DRAWN = 64
"""The most tokens of a sample that is drawn here."""
ENDLESS = 10**9
"""More tokens than a row has."""
ROOM = 0.9
"""The share of a device's memory that the plan may fill."""
LEVELS = {"error": "red", "warning": "yellow", "note": "default"}
"""Colours."""


@dataclass
class Report:
    """What `check` found."""

    findings: list[Finding] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Prompt, output, and what reward_fn and metric_fn say of it."""

    def note(self, about: str, says: str, level: str = "note") -> None:
        self.findings.append(Finding(level, about, says))

    @contextmanager
    def watching(self, about: str) -> Iterator[None]:
        """Makes findings of what is logged in the block, and of the error that ends it."""
        log, kept = logging.getLogger("trlx"), _Kept(level=logging.INFO)
        before = log.handlers, log.propagate
        log.handlers, log.propagate = [kept], False
        try:
            yield
        except Exception as error:
            kept.messages["error"] = sentence(error), "error"
        finally:
            log.handlers, log.propagate = before
            said = {finding.says for finding in self.findings}
            self.findings += [Finding(level, about, says) for says, level in kept.messages.values() if says not in said]

    @property
    def is_good(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)


class _Kept(logging.Handler):
    """Keeps each message once."""

    def __init__(self, level: int):
        super().__init__(level)
        self.messages: dict[str, tuple[str, str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        says = record.getMessage()
        self.messages[says] = says, "note" if record.levelno < logging.WARNING else "warning"


def check(job: Job, processes: int | None = None, draw: bool = False) -> Report:
    """Checks what ``trlx train`` would run, as far as that is possible without weights.

    Args:
        processes: as many as the run will have; None: those of a division among the presets, or one.
        draw: reads the model, and scores samples of its own. Otherwise words of the prompts stand for them.
    """
    report, given = Report(), None
    report.findings += versions()
    with report.watching("settings"):
        given = job.arguments()
    if given is None:
        return report
    config, division = given["config"], division_of(job.settings)
    gpus = processes or (division and division.gpus)
    run = _memory(report, job, config, gpus, division)
    trainer = read = None
    with report.watching("model"):
        if config.train.trainer.startswith("Accelerate"):
            check_settings(config.optimizer, config.scheduler)
        kind = on_paper(trainers.get(config.train.trainer), run.data if isinstance(run, Run) else gpus or 1)
        trainer = kind(**_arguments(given))
        _template(report, trainer, given)
    if trainer is not None:
        with report.watching("data"):
            _data(report, trainer, given)
            _batches(report, trainer)
            read = trainer
    _disk(report, config, run, read)
    with report.watching("folder"):
        _folder(report, config, read)
    if read is not None:
        with report.watching("reward"):
            _rewards(report, read, given, draw)
    return report


def lines(report: Report, as_json: bool) -> Iterator[str]:
    """The report as a table, or as one JSON object."""
    if as_json:
        findings = [finding._asdict() for finding in report.findings]
        yield json.dumps({"good": report.is_good, "findings": findings, "samples": report.samples}, indent=1)
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for table in (_samples_table(report.samples), _findings_table(report.findings)):
        if table.row_count:
            with console.capture() as captured:
                console.print(table)
            yield "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
    counts = {level: sum(each.level == level for each in report.findings) for level in LEVELS}
    yield ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items())


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer."""
    config = given["config"].evolve(train={"rollout_logging_dir": None})  # or its folder would be made
    functions = {name: given.get(name) for name in ("reward_fn", "metric_fn", "stop_sequences")}
    return {"config": config, **functions, **config.train.trainer_kwargs}


def _rows(given: dict[str, Any]) -> dict[str, list[Any]]:
    names = ("prompts", "eval_prompts", "samples", "rewards", "eval_samples")
    return {name: given[name] for name in names if name in given}


def _template(report: Report, trainer: Trainer, given: dict[str, Any]) -> None:
    tokenizer = trainer.tokenizer
    if tokenizer.chat_template is None:
        return
    try:
        chat_prompt([{"role": "user", "content": "Hello"}], tokenizer, "A greeting")
    except Exception as error:  # of the template's own code
        report.note("tokenizer", f"The chat template cannot write a greeting: {sentence(error)}", "warning")
    first = next(iter(given.get("prompts") or []), None)
    if isinstance(first, str) or (isinstance(first, dict) and isinstance(first.get("prompt"), str)):
        report.note(
            "tokenizer",
            "The tokenizer has a chat template, which texts do not use: write prompts as messages if the model answers "
            'chats, [{"role": "user", "content": ...}]',
        )


def _data(report: Report, trainer: Trainer, given: dict[str, Any]) -> None:
    """Reads the data as a run does, and counts their tokens as they are before anything is cut."""
    rows = _rows(given)
    feed(trainer, **rows)
    length, name, counts = trainer.config.train.seq_length, "prompts" if trainer.online else "samples", []
    with Report().watching(name):  # it says the same again
        if trainer.online:
            special, new = trainer.backend.row_format.special_tokens, trainer.sampling_kwargs["max_new_tokens"]
            whole = pipelines.get(trainer.config.train.pipeline)(
                given["prompts"][:COUNTED], ENDLESS, trainer.tokenizer, add_special_tokens=special
            )
            counts, room = [len(whole[i].ids) for i in range(len(whole))], f"{length - new} fit beside {new} new tokens"
        elif isinstance(getattr(trainer, "samples", None), RolloutStore):
            cut, data = trainer.samples, [given[each][:COUNTED] for each in ("samples", "rewards") if each in given]
            trainer.make_experience(*data, ENDLESS)
            counts = [len(each.prompt) + len(each.response) for each in trainer.samples.rollouts]
            trainer.samples, room = cut, f"{length} fit (train.seq_length)"
    if not counts:  # a method of the user's own
        return
    high = sorted(counts)[int(0.95 * (len(counts) - 1))]
    report.note(
        name,
        f"{len(rows[name])} {name}; tokens: median {statistics.median(counts):.0f}, 95 % have at most {high}, "
        f"the longest {max(counts)}; {room}",
    )


def _batches(report: Report, trainer: Trainer) -> None:
    train, schedule, rows = trainer.config.train, trainer.schedule, trainer.rows_per_epoch
    size, steps = schedule.batch_size, trainer.total_steps
    ranks = f", {train.batch_size} on each of {schedule.data_size} data ranks" if schedule.data_size > 1 else ""
    report.note("batches", f"A step trains on {size} rows{ranks}; there are {steps} steps")
    if trainer.online and rows is not None:
        prompts, there = rows // trainer.samples_per_prompt, len(trainer.stream.pipeline)
        again = f", and there are {there}, so that some are asked several times" if there < prompts else ""
        report.note("batches", f"A collection has {rows} samples of {prompts} prompts{again}")
    if rows is not None and rows < size:
        what = "a collection has" if trainer.online else "there are"
        report.note("batches", f"A step asks for {size} rows, but {what} {rows}: lower train.batch_size", "warning")
    if steps is not None and train.eval_interval > steps:
        says = (
            f"train.eval_interval ({train.eval_interval}) is longer than the run: it is evaluated before and after only"
        )
        report.note("batches", says)


def _rewards(report: Report, trainer: Trainer, given: dict[str, Any], draw: bool) -> None:
    """Has samples of a few prompts judged, as in an evaluation."""
    if not trainer.generates or (trainer.scorer is None and trainer.metric_fn is None):
        return
    if draw:
        trainer = trainers.get(given["config"].train.trainer)(**_arguments(given))
        feed(trainer, **{name: rows[:SCORED] for name, rows in _rows(given).items()})
    judge = trainer.evaluator
    prompts = trainer.stream.pipeline if trainer.online else judge.prompts
    variants = judge.variants
    judge.prompts = [prompts[i] for i in range(min(SCORED, len(prompts)))]
    judge.variants = [(name, replace(how, max_new_tokens=min(how.max_new_tokens, DRAWN))) for name, how in variants]
    judge.backend.data_size, judge.held_out = 1, None
    result = judge.run()
    report.samples = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    whose = "samples of the model" if draw else "words of the prompts (with --draw, samples of the model)"
    scores = [row["reward"] for row in report.samples if "reward" in row]
    report.note("reward", f"{len(report.samples)} rows took {result.metrics['time/metric']:.1f} seconds: {whose}")
    if len(scores) > 1 and len(set(scores)) == 1:
        says = f"All {len(scores)} have the score {scores[0]:g}: equal scores do not say which are better"
        report.note("reward", says, "warning")


def _memory(report: Report, job: Job, config: TRLConfig, gpus: int | None, division: Layout | None) -> Any:
    """The run on paper; None: there is no plan for it."""
    run, known = None, known_shape(config.model.model_path)
    with report.watching("memory"):
        planned = config if known is None else config.evolve(model={"model_path": known})
        name, has, level = _device(gpus or 1, division)
        try:
            run, phases, _ = Planner(gpus, GPT2_VOCABULARY, has, division and division.accelerate)(planned)
        except ConfigError as error:
            if config.train.trainer.startswith("NeMo"):  # its settings are checked on the way
                raise
            report.note("memory", f"There is no plan: {error}")
            return None
        most = peak(phases)
        takes = f"The phase {most.name} takes {most.total / GIB:.2f} GiB on each process; {name} has {has / GIB:.0f}"
        if most.total > has:
            words = " ".join(["trlx plan", *job.settings])
            report.note("memory", f"{takes}: {words} names settings that take less", level)
        elif most.total > ROOM * has:
            report.note("memory", f"{takes}: leave a tenth for libraries and gaps of the allocator", "warning")
        else:
            report.note("memory", takes)
    return run


def _device(processes: int, division: Layout | None) -> tuple[str, float, str]:
    """(what holds a process, its bytes, the level of a finding that they are too few)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], "error"
    if division is not None:
        return "a GPU of the kind that this preset is for", 80 * GIB, "warning"
    return "this machine, without a GPU,", psutil.virtual_memory().available / processes, "warning"


def _disk(report: Report, config: TRLConfig, run: Any, trainer: Trainer | None) -> None:
    if run is None:
        return
    if isinstance(run, Run):
        counts = [parameters(run, stage) for stage in run.stages]
        trained = sum(count.trained + count.trained_heads for count in counts) * run.parallel.tensor
        size = checkpoint_size(config, trained, total_parameters(run.shape, run.output_layer) - trained)
    else:
        size = run.saved
    found = list(disk(config.train, size, trainer and trainer.total_steps))
    report.findings += found or [Finding("note", "disk", f"A checkpoint takes about {size / GIB:.2f} GiB")]


def _folder(report: Report, config: TRLConfig, trainer: Trainer | None) -> None:
    """What an earlier run left in the folder, and what a resume would do."""
    folder = Path(config.train.checkpoint_dir)
    source = run_folder.to_resume(config.train.resume_from_checkpoint, folder)
    if source is None:
        last = checkpoint.newest(folder)
        if run_folder.of_a_run(folder):
            at = f" at step {checkpoint.step_of(last)}" if last else ""
            hint = ", or go on from there (--resume, train.resume_from_checkpoint=auto)" if last else ""
            report.note(
                "folder",
                f"{folder} holds another run{at}, whose files will move to a subfolder: name another one (--out){hint}",
                "warning",
            )
        return
    report.note("folder", f"The run goes on from {source}, after step {checkpoint.step_of(source)}")
    if trainer is None:
        return
    saved = checkpoint.read_state(source, tensors=False)[1]
    trainer.backend.fingerprint, trainer.backend.lr_schedule = saved["model"], saved["schedule"]  # not known on paper
    for change in changes(saved, identity(config, trainer.backend, trainer.data_digest)):
        report.note("folder", f"Something has changed. {change}", "warning")


def _samples_table(samples: list[dict[str, Any]]) -> Table:
    table = Table(title="What is judged", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in samples[0] if samples else ():
        table.add_column(name, ratio=3 if name in ("prompt", "output") else 1)
    for row in samples:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _findings_table(findings: list[Finding]) -> Table:
    table = Table(title="Findings", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in sorted(findings, key=lambda each: [*LEVELS].index(each.level)):
        table.add_row(Text(finding.level, LEVELS[finding.level]), finding.about, Text(finding.says))
    return table


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)[:200]
