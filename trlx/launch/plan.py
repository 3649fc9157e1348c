"""``python -m trlx plan``: what a NeMo trainer's layout takes, before a GPU is paid for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trlx.backends.megatron.layout_checks import check_layout
from trlx.backends.megatron.settings import OPTIONS, MegatronSettings, Parallel, Recompute, read_settings
from trlx.backends.megatron.shape import Shape
from trlx.config import TRLConfig
from trlx.launch.scale import Run, bubble, parameters, total_parameters
from trlx.launch.scale_memory import Memory, cache, memory
from trlx.launch.scale_traffic import traffic
from trlx.presets import load_preset
from trlx.strict import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

GPT2_VOCABULARY = 50257
"""Tokens of a model that a NeMo-shaped file describes, where nothing else is said: the tokenizer is not read here."""
GIB = 2**30
PER_NODE = 8
FULL = Recompute("full", "uniform", 1)
SBATCH = "examples/slurm/megatron_{}_node.sbatch"
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


def read_run(config: TRLConfig, gpus: int | None = None, vocabulary: int = GPT2_VOCABULARY) -> Run:
    """The run that a NeMo trainer would make of `config`, on paper.

    Args:
        gpus: None: as many as ``trainer.devices`` x ``trainer.num_nodes``, else as one copy of the model takes.

    Raises:
        ConfigError: the layout does not divide what it has to divide; the message says what to write.
        OSError: the pretrained model's folder has no configuration.
    """
    train = config.train
    asked = {key: value for key, value in train.trainer_kwargs.items() if key in OPTIONS}
    settings = read_settings(
        asked, train=train, model=config.model, optimizer=config.optimizer, scheduler=config.scheduler
    )
    shape = _shape(settings, config, vocabulary)
    parallel = settings.parallel
    copy = parallel.tensor * parallel.pipeline
    gpus = gpus or (settings.devices or 1) * (settings.num_nodes or 1)
    gpus = max(gpus, copy)
    check_layout(dataclasses.replace(settings, devices=None, num_nodes=None), shape, gpus, train.batch_size)
    return Run(
        shape=shape,
        parallel=parallel,
        data=gpus // copy,
        rows=settings.micro_batch_size,
        microbatches=train.batch_size // settings.micro_batch_size,
        length=train.seq_length,
        response=_response(config),
        element=settings.dtype.itemsize,
        recompute=settings.recompute,
        distributed=settings.optim.distributed,
        moments=len(settings.optim.moment_names),
        unfrozen=settings.num_layers_unfrozen,
        dropout=config.method.name != "PPOConfig" and shape.hidden_dropout > 0,
        divisor=settings.make_vocab_size_divisible_by,
        **needs(config.method.name.removesuffix("Config"), getattr(config.method, "two_qs", True)),
    )


def needs(algorithm: str, two_qs: bool = True) -> dict[str, bool | int]:
    """What PPO, ILQL or SFT keep beside the language model.

    Raises:
        ValueError: there is no NeMo trainer for the algorithm.
    """
    known = {
        "PPO": {"value_head": True, "reference": True},
        "ILQL": {"value_head": True, "q_heads": 2 if two_qs else 1},
        "SFT": {},
    }
    if algorithm not in known:
        raise ValueError(f"There is no NeMo trainer for {algorithm}: write one of {', '.join(known)}")
    return known[algorithm]


def fit(run: Run, gpus: int, limit: float) -> Run | None:
    """`run` in the smallest layout whose fullest process holds at most `limit` bytes; None: there is none.

    As many rows per step in all as before. Tensor ranks stay within a node of 8 and are preferred to stages, which
    wait for each other; computing layers again is preferred to nothing but not fitting.
    """
    rows = run.data * run.rows * run.microbatches
    for recompute in (Recompute(), FULL):
        for parallel in _layouts(run.shape, gpus):
            data = gpus // (parallel.tensor * parallel.pipeline)
            if rows % (data * run.rows):
                continue
            microbatches = rows // (data * run.rows)
            tried = dataclasses.replace(
                run, parallel=parallel, data=data, microbatches=microbatches, recompute=recompute
            )
            if fullest(tried).total <= limit:
                return tried
    return None


def fullest(run: Run) -> Memory:
    """Memory of the stage that needs most."""
    return max((memory(run, stage) for stage in run.stages), key=lambda held: held.total)


def launch_line(gpus: int) -> str:
    """How SLURM starts so many processes."""
    nodes = -(-gpus // PER_NODE)
    each = gpus if nodes == 1 else PER_NODE
    return f"sbatch --nodes={nodes} --gpus-per-node={each} {SBATCH.format('single' if nodes == 1 else 'multi')}"


def plan(name: str, method: str, overrides: list[str], gpus: int | None, vocabulary: int, limit: float) -> None:
    """Prints the plan of a preset, a YAML file, or a folder with a Hugging Face model.

    Raises:
        ConfigError: see `read_run`.
        ValueError: there is no such preset, file or folder.
    """
    from rich.console import Console

    config = read_config(name, method, overrides)
    run = read_run(config, gpus, vocabulary)
    console = Console()
    for line in _headline(name, run):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_memory_table(run))
    console.print(_traffic_table(run))
    for line in _remarks(config, run, limit):
        console.print(line, highlight=False, soft_wrap=True)


def read_config(name: str, method: str, overrides: list[str]) -> TRLConfig:
    """A method's preset with `name` over it: a preset, a YAML file, or a folder with a Hugging Face model."""
    if not Path(name).is_dir():
        return load_preset(method, name, overrides=overrides)
    trainer = f"train.trainer=NeMo{method.upper()}Trainer"
    return load_preset(method, overrides=[trainer, f"model.model_path={name}", *overrides])


def _shape(settings: MegatronSettings, config: TRLConfig, vocabulary: int) -> Shape:
    if settings.shape is not None and settings.pretrained_model is None:
        return dataclasses.replace(settings.shape, vocab_size=vocabulary)
    from transformers import AutoConfig, PretrainedConfig

    from trlx.backends.megatron.families import shape_of

    path = settings.pretrained_model
    found = config.model.model_path if path is None else AutoConfig.from_pretrained(path)
    if not isinstance(found, PretrainedConfig):
        raise ConfigError(f"model.model_path {found!r} is not a model of transformers: write a folder or a preset")
    return shape_of(found)


def _response(config: TRLConfig) -> int:
    """The longest response: all tokens but the first, unless less is generated."""
    most = config.train.seq_length - 1
    if config.method.name != "PPOConfig":
        return most
    return min(most, int(config.method.gen_kwargs.get("max_new_tokens", most)))


def _layouts(shape: Shape, gpus: int) -> list[Parallel]:
    """Every division of the model, smallest first, fewest stages first."""
    widths = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size, gpus)
    tensors = [t for t in (1, 2, 4, 8) if not any(width % t for width in widths)]
    pipelines = [p for p in range(1, shape.num_layers + 1) if shape.num_layers % p == 0]
    found = [(t, p) for t in tensors for p in pipelines if gpus % (t * p) == 0]
    return [Parallel(t, p, None, t > 1) for t, p in sorted(found, key=lambda each: (each[0] * each[1], each[1]))]


def _headline(name: str, run: Run) -> Iterator[str]:
    parallel = run.parallel
    virtual = f", {parallel.virtual} chunks of layers a stage" if parallel.virtual else ""
    sequence = ", sequence parallel" if parallel.sequence else ""
    trained = "all" if run.unfrozen == -1 else f"the top {run.unfrozen}"
    yield (
        f"[bold]{name}[/bold]: {total_parameters(run.shape) / 1e9:.2f} billion parameters, {trained} of "
        f"{run.shape.num_layers} layers trained"
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
    table = _table("GiB on a GPU at most, by stage", ["stage", "billion\nweights", *COLUMNS])
    for stage in run.stages:
        held, count = memory(run, stage), parameters(run, stage)
        sizes = [f"{getattr(held, field) / GIB:.2f}" for field in COLUMNS.values()]
        table.add_row(str(stage), f"{(count.model + count.heads) / 1e9:.3f}", *sizes)
    return table


def _traffic_table(run: Run) -> Table:
    groups = ["tensor", "pipeline", "embedding", "data"]
    table = _table("GB that a GPU sends in a step, by stage", ["stage", *groups])
    for stage in run.stages:
        sent = traffic(run, stage)
        table.add_row(str(stage), *[f"{sent[group] / 1e9:.2f}" for group in groups])
    return table


def _table(title: str, columns: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _remarks(config: TRLConfig, run: Run, limit: float) -> Iterator[str]:
    rows = int(getattr(config.method, "chunk_size", config.train.batch_size))
    kept = max(cache(run, stage, rows, run.length) for stage in run.stages) / GIB
    yield f"Generating {rows} rows of {run.length} tokens on each data rank takes {kept:.2f} GiB for keys and values."
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
