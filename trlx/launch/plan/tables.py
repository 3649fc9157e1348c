"""The plan that the command prints: the run in words, tables of memory and traffic, and advice."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from trlx.config import TRLConfig
from trlx.launch.plan import nemo
from trlx.launch.plan.accelerate import AccelerateRun, Launch
from trlx.launch.plan.changes import SHARED, Verdict, cheapest, ladders_of
from trlx.launch.plan.layouts import FULL, fit, fullest, launch_line
from trlx.launch.plan.memory import FLOAT, cache, memory
from trlx.launch.plan.parameters import parameters, total_parameters
from trlx.launch.plan.phases import PARTS, Phase, peak
from trlx.launch.plan.rehearsal import Rehearsal
from trlx.launch.plan.run import TRAINERS, Run, read_config, read_run
from trlx.launch.plan.traffic import bubble, traffic
from trlx.launch.plan.work import EFFICIENCY, Gpu, Work, gpu_named
from trlx.model_presets import Layout, is_layer, layout
from trlx.strict import ConfigError

GIB = 2**30
COLUMNS = {
    "weights": "weights",
    "gra-\ndients": "gradients",
    "float32\nweights": "main_weights",
    "moments": "moments",
    "refe-\nrence": "reference",
    "acti-\nvations": "activations",
    "tempo-\nrary": "temporary",
    "total": "total",
}


def plan(
    words: list[str],
    method: str,
    model: str | None,
    gpus: int | None,
    vocabulary: int,
    limit: float | None = None,
    accelerate: str | None = None,
    gpu: str = "h100",
    efficiency: float = EFFICIENCY,
) -> None:
    """Prints the plan of what `read_config` makes of `words`.

    The trainer in the configuration says for which backend. A folder is planned for a NeMo trainer, unless `accelerate`
    or ``train.trainer`` in `words` says something else. A number of GPUs among the words gives `gpus` and `accelerate`
    if they are None.

    Args:
        limit: bytes of one GPU; None: as many as `gpu` has.
        accelerate: a file of configs/accelerate/, by its name or path: how processes of an Accelerate trainer start.
        gpu: one of `GPUS`, whose speed gives the time of a step.
        efficiency: the share of that speed to count on.

    Raises:
        ConfigError: see `read_run`, `AccelerateRun` and `gpu_named`.
        ValueError: there is no such preset, file or folder.
    """
    speed = gpu_named(gpu)
    if not 0 < efficiency <= 1:
        raise ConfigError(f"The efficiency must be above 0 and at most 1, got {efficiency:g}: write e.g. {EFFICIENCY}")
    config, name = read_config(words, method, accelerate is None, model), " ".join(w for w in words if "=" not in w)
    division = division_of(words)
    if division is not None:
        gpus, accelerate = gpus or division.gpus, accelerate or division.accelerate
    limit = speed.memory * GIB if limit is None else limit
    planner = Planner(gpus, vocabulary, limit, accelerate)
    run, phases, work = planner(config)
    is_nemo = isinstance(run, Run)
    head = _headline(name, run) if is_nemo else _accelerate_headline(name, run)
    tables = {"GiB on a process at most, by phase": _phases_table(phases)}
    if is_nemo:
        tables["GiB on a GPU at most in an update, by stage"] = _memory_table(run)
        tables["GB that a GPU sends in a step, by stage"] = _traffic_table(run)
    tables["What a step computes, on all processes"] = _work_table(work, speed, efficiency)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has room for every column; rich would cut them at 80 characters
    for line in head:
        console.print(line, highlight=False, soft_wrap=True)
    for title, table in tables.items():
        console.print(f"\n[italic]{title}[/italic]")
        console.print(table)
    for line in (
        _time_remark(work, speed, efficiency),
        *(_remarks(config, run, limit) if is_nemo else _accelerate_remarks(run)),
        *_fit_remarks(config, planner, run, phases, speed, efficiency),
    ):
        console.print(line, highlight=False, soft_wrap=True)


def division_of(words: list[str]) -> Layout | None:
    """The division over GPUs that presets among `words` name."""
    layers = [word for word in words if is_layer(word)]
    return layout(layers) if layers else None


@dataclass
class Planner:
    """Plans one run and runs that differ from it, for either backend."""

    gpus: int | None
    vocabulary: int
    limit: float
    accelerate: str | None

    def __post_init__(self):
        self.rehearsals: dict[str, Rehearsal] = {}

    def __call__(self, config: TRLConfig, accelerate: str | None = None) -> tuple[Any, list[Phase], Work]:
        """(the run on paper, its phases, what it computes)."""
        if config.train.trainer.startswith("NeMo"):
            run = read_run(config, self.gpus, self.vocabulary)
            return run, nemo.phases(run, config), nemo.work(run, config)
        launch = Launch.read(accelerate or self.accelerate, self.gpus)
        run = AccelerateRun(config, launch, self.limit, self.rehearsals)
        return run, run.phases(), run.work


def _fit_remarks(
    config: TRLConfig, planner: Planner, run: Any, phases: list[Phase], speed: Gpu, efficiency: float
) -> Iterator[str]:
    limit, most = planner.limit, peak(phases)

    def assess(settings: dict[str, Any]) -> Verdict:
        sections = {key: value for key, value in settings.items() if key != SHARED}
        _, phases, work = planner(TRLConfig.update(config, sections), settings.get(SHARED))
        excess = sum(max(phase.total - limit, 0) for phase in phases)
        return Verdict(peak(phases).total, excess, sum(work.seconds(speed, efficiency).values()))

    needs = f"{limit / GIB:.0f} GiB: the phase {most.name} takes {most.total / GIB:.2f}."
    if most.total <= limit:
        yield f"All phases fit into {needs}"
        return
    yield f"Not all phases fit into {needs}"
    with _quiet():
        found, before = cheapest(_ladders(config, run, limit), assess), assess({}).seconds
    for change in found:
        slower = change.verdict.seconds / before - 1
        other = ", other numbers" if change.cost[0] else ""
        yield f"  {change}: {change.verdict.peak / GIB:.2f} GiB, {slower:+.0%} time{other}"
    if not found:
        yield "No one and no two of the changes that trlx knows are enough: take more or larger GPUs, or fewer tokens."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: those of a run were shown before, and runs that differ from it have the same."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _ladders(config: TRLConfig, run: Run | AccelerateRun, limit: float) -> list[list[dict[str, Any]]]:
    if isinstance(run, AccelerateRun):
        shareable = run.launch.processes > 1 and not run.launch.shards
        return ladders_of(config, run.rows, run.rehearsal.layers, run.half, shareable)
    found = ladders_of(config, run.rows, run.shape.num_layers, run.element < FLOAT, False)
    smaller = fit(run, run.gpus, limit)
    return found if smaller is None else [_as_settings(smaller), *found]


def _as_settings(run: Run) -> list[dict[str, Any]]:
    """A layout, with as many rows in a step as before."""
    sizes = {"tensor_model_parallel_size": run.parallel.tensor, "pipeline_model_parallel_size": run.parallel.pipeline}
    kwargs = {f"train.trainer_kwargs.{key}": value for key, value in sizes.items()}
    again = {"train.gradient_checkpointing": True} if run.recompute == FULL else {}
    return [{**kwargs, "train.batch_size": run.rows * run.microbatches, **again}]


def _accelerate_headline(name: str, run: AccelerateRun) -> Iterator[str]:
    weights, launch, train = run.weights, run.launch, run.config.train
    trained = f"{weights.trained / 1e9:.2f} billion train"
    yield f"[bold]{name}[/bold]: {weights.model / 1e9:.2f} billion parameters, {trained}"
    many = "process" if launch.processes == 1 else "processes"
    shared = ", which share weights, gradients and moments (FSDP2)" if launch.shards else ""
    yield f"{launch.processes} {many} on Accelerate{shared}"
    rows = train.batch_size * launch.processes
    yield f"{rows} rows of at most {run.length} tokens per step; microbatches of {run.rows}"


def _phases_table(phases: list[Phase]) -> Table:
    columns = [name for name in PARTS if any(phase.parts.get(name) for phase in phases)]
    table = _table(["phase", *columns, "total"])
    for phase in phases:
        sizes = [phase.parts.get(name, 0) for name in columns]
        table.add_row(phase.name, *[f"{size / GIB:.2f}" for size in (*sizes, phase.total)])
    return table


def _accelerate_remarks(run: AccelerateRun) -> Iterator[str]:
    yield f"A checkpoint takes {run.saved / GIB:.2f} GiB of main memory and of the disk."


def _work_table(work: Work, speed: Gpu, efficiency: float) -> Table:
    table, seconds = _table(["phase", "million\ntokens", "PFLOP", "seconds"]), work.seconds(speed, efficiency)
    for name, flops in work.flops.items():
        if flops:
            table.add_row(name, f"{work.tokens[name] / 1e6:.3f}", f"{flops / 1e15:.2f}", f"{seconds[name]:.2f}")
    table.add_row("step", "", f"{sum(work.flops.values()) / 1e15:.2f}", f"{sum(seconds.values()):.2f}")
    return table


def _time_remark(work: Work, speed: Gpu, efficiency: float) -> str:
    teraflops = speed.half if work.half else speed.single
    return (
        f"Seconds are for {work.gpus} x {speed.name} at {efficiency:.0%} of {teraflops:g} TFLOPS and {speed.speed:g} "
        "GB/s, without messages between processes and without reward_fn."
    )


def _headline(name: str, run: Run) -> Iterator[str]:
    parallel = run.parallel
    virtual = f", {parallel.virtual} chunks of layers a stage" if parallel.virtual else ""
    sequence = ", sequence parallel" if parallel.sequence else ""
    trained = "all" if run.unfrozen == -1 else f"the top {run.unfrozen}"
    billions = total_parameters(run.shape, run.output_layer) / 1e9
    yield (
        f"[bold]{name}[/bold]: {billions:.2f} billion parameters, {trained} of {run.shape.num_layers} layers trained"
    )
    yield (
        f"{run.gpus} GPUs = {parallel.tensor} (tensor) x {parallel.pipeline} (pipeline) x {run.data} (data)"
        f"{virtual}{sequence}"
    )
    yield (
        f"{run.data * run.rows * run.microbatches} rows of {run.length} tokens per step, {run.response} of them "
        f"scored; {run.microbatches} microbatches of {run.rows} each on every data rank; pipeline bubble "
        f"{bubble(run):.1%}"
    )


def _memory_table(run: Run) -> Table:
    table = _table(["stage", "billion\nweights", *COLUMNS])
    for stage in run.stages:
        held, count = memory(run, stage), parameters(run, stage)
        sizes = [f"{getattr(held, field) / GIB:.2f}" for field in COLUMNS.values()]
        table.add_row(str(stage), f"{(count.model + count.heads) / 1e9:.3f}", *sizes)
    return table


def _traffic_table(run: Run) -> Table:
    groups = ["tensor", "pipeline", "embedding", "data"]
    table = _table(["stage", *groups])
    for stage in run.stages:
        sent = traffic(run, stage)
        table.add_row(str(stage), *[f"{sent[group] / 1e9:.2f}" for group in groups])
    return table


def _table(columns: list[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _remarks(config: TRLConfig, run: Run, limit: float) -> Iterator[str]:
    if TRAINERS[config.method.name].generates:
        rows = int(getattr(config.method, "chunk_size", config.train.batch_size))
        kept = max(cache(run, stage, rows, run.length) for stage in run.stages) / GIB
        yield (
            f"Generating {rows} rows of {run.length} tokens on each data rank takes {kept:.2f} GiB for keys and values."
        )
    if fullest(run).total <= limit:
        yield f"It fits into {limit / GIB:.0f} GiB."
    else:
        smaller = fit(run, run.gpus, limit)
        yield f"It does not fit into {limit / GIB:.0f} GiB. {_advice(smaller)}"
    yield f"{launch_line(run.gpus)} YOUR.MODULE"
    if config.method.name == "PPOConfig" and run.unfrozen != -1:
        yield "model.num_layers_unfrozen=-1 trains all layers."


def _advice(run: Run | None) -> str:
    if run is None:
        return "Take more GPUs, fewer rows per microbatch or fewer tokens."
    again = ", computing layers again (activations_checkpoint_granularity: full)" if run.recompute == FULL else ""
    return f"{run.parallel.tensor} (tensor) x {run.parallel.pipeline} (pipeline) would{again}."
