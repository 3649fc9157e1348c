"""The plan that the command prints: the run in words, tables of memory and traffic, and advice."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from trlx.config import TRLConfig
from trlx.launch.plan.accelerate import AccelerateRun, Launch
from trlx.launch.plan.layouts import FULL, fit, fullest, launch_line
from trlx.launch.plan.memory import cache, memory
from trlx.launch.plan.parameters import parameters, total_parameters
from trlx.launch.plan.phases import PARTS, Phase
from trlx.launch.plan.run import TRAINERS, Run, read_config, read_run
from trlx.launch.plan.traffic import bubble, traffic

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
    name: str,
    method: str,
    overrides: list[str],
    gpus: int | None,
    vocabulary: int,
    limit: float,
    accelerate: str | None = None,
) -> None:
    """Prints the plan of a preset, a YAML file, or a folder with a Hugging Face model.

    The trainer in the configuration says for which backend. A folder is planned for a NeMo trainer, unless `accelerate`
    or ``train.trainer`` in `overrides` says something else.

    Args:
        accelerate: a file of configs/accelerate/, by its name or path: how processes of an Accelerate trainer start.

    Raises:
        ConfigError: see `read_run` and `AccelerateRun`.
        ValueError: there is no such preset, file or folder.
    """
    config = read_config(name, method, overrides, nemo=accelerate is None)
    if config.train.trainer.startswith("NeMo"):
        run = read_run(config, gpus, vocabulary)
        head, remarks = _headline(name, run), _remarks(config, run, limit)
        tables = {
            "GiB on a GPU at most, by stage": _memory_table(run),
            "GB that a GPU sends in a step, by stage": _traffic_table(run),
        }
    else:
        run = AccelerateRun(config, Launch.read(accelerate, gpus), limit)
        phases = run.phases()
        head, remarks = _accelerate_headline(name, run), _accelerate_remarks(run, phases, limit)
        tables = {"GiB on a process at most, by phase": _phases_table(phases)}
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has room for every column; rich would cut them at 80 characters
    for line in head:
        console.print(line, highlight=False, soft_wrap=True)
    for title, table in tables.items():
        console.print(f"\n[italic]{title}[/italic]")
        console.print(table)
    for line in remarks:
        console.print(line, highlight=False, soft_wrap=True)


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


def _accelerate_remarks(run: AccelerateRun, phases: list[Phase], limit: float) -> Iterator[str]:
    most = max(phases, key=lambda phase: phase.total)
    fits = "It fits" if most.total <= limit else "It does not fit"
    yield f"{fits} into {limit / GIB:.0f} GiB: the phase {most.name} takes {most.total / GIB:.2f}."
    yield f"A checkpoint takes {run.saved / GIB:.2f} GiB of main memory and of the disk."


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
