"""Writes the tables of docs/scaling.md from the formulas in trlx/launch/plan/.

Usage: python -m docs.scaling_tables
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.families import decoder_config_of
from trlx.backends.megatron.settings import ParallelSizes, Recompute
from trlx.launch.plan.layouts import fit, fullest, launch_line
from trlx.launch.plan.memory import cache
from trlx.launch.plan.parameters import total_parameters
from trlx.launch.plan.run import GPT2_VOCABULARY, Run, read_config, read_run, trainer_needs
from trlx.launch.plan.tables import GIB
from trlx.launch.plan.traffic import bubble, traffic
from trlx.presets import load_preset

PAGE = Path(__file__).parent / "scaling.md"
MARK = "<!-- Below this line everything is written by docs/scaling_tables.py. -->\n"
GPUS = (8, 16, 32, 64, 128, 256)
LIMIT = 72 * GIB
ROWS, LENGTH, RESPONSE = 256, 2048, 1024
PRESETS = ("megatron_1.3b", "megatron_2b", "megatron_20b", "megatron_65b")
COLUMNS = (
    "GPUs",
    "tensor x pipeline x data",
    "weights, reference",
    "gradients",
    "float32 weights, moments",
    "activations",
    "all",
    "bubble",
    "tensor",
    "pipeline",
    "data",
)


def page() -> str:
    """The page as it should be: what is written by hand above the mark, tables below."""
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + mark + "".join(tables())


def tables() -> Iterator[str]:
    """Markdown for every model, then for the presets."""
    for name, shape in models().items():
        yield f"\n## {name}: {total_parameters(shape) / 1e9:.1f} billion parameters\n\n{_row(COLUMNS)}"
        yield _row(["---"] * len(COLUMNS))
        yield from (_row(cells(on_paper(shape), gpus)) for gpus in GPUS)
    yield "\n## Presets, as they are\n\n"
    yield _row(["preset", "GPUs", "trains", "GiB, training", "and keys and values", "bubble", "launch"])
    yield _row(["---"] * 7)
    yield from (_row(preset_cells(name, unfrozen)) for name in PRESETS for unfrozen in (2, -1))


def models() -> dict[str, DecoderConfig]:
    """The shapes of the tables: presets, and Llama-2 for the sizes that have none."""
    small = dataclasses.replace(_preset_shape("megatron_1.3b"), ffn_hidden_size=4 * 2048)
    llama = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    seven = LlamaConfig(**llama)
    seventy = LlamaConfig(
        **llama,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    return {
        "GPT-3 XL": small,
        "Llama-2 7B": decoder_config_of(seven),
        "megatron_20b": _preset_shape("megatron_20b"),
        "megatron_65b": _preset_shape("megatron_65b"),
        "Llama-2 70B": decoder_config_of(seventy),
    }


def on_paper(shape: DecoderConfig) -> Run:
    """PPO that trains every layer, on as many GPUs as there are rows; to be fitted."""
    return Run(
        shape=shape,
        parallel=ParallelSizes(),
        data=ROWS,
        rows=1,
        microbatches=1,
        length=LENGTH,
        response=RESPONSE,
        recompute=Recompute(),
        distributed=True,
        needs=trainer_needs(load_preset("ppo").method),
    )


def cells(run: Run, gpus: int) -> list[str]:
    """One row of a model's table."""
    found = fit(run, gpus, LIMIT)
    if found is None:
        return [str(gpus), "does not fit", *[""] * (len(COLUMNS) - 2)]
    held, parallel = fullest(found), found.parallel
    again = " *" if found.recompute.granularity else ""
    sizes = (
        held.weights + held.reference,
        held.gradients,
        held.main_weights + held.moments,
        held.activations + held.temporary,
        held.total,
    )
    sent = [traffic(found, stage) for stage in found.stages]
    most = [max(each[group] for each in sent) for group in ("tensor", "pipeline", "data")]
    return [
        str(gpus),
        f"{parallel.tensor} x {parallel.pipeline} x {found.data}{again}",
        *[f"{size / GIB:.1f}" for size in sizes],
        f"{bubble(found):.1%}",
        *[f"{size / 1e9:.1f}" for size in most],
    ]


def preset_cells(name: str, unfrozen: int) -> list[str]:
    """A preset over PPO's, in its own layout."""
    config = read_config([name, f"model.num_layers_unfrozen={unfrozen}"], "ppo")
    run = read_run(config)
    rows = config.method.chunk_size
    generating = max(cache(run, stage, rows, run.length) for stage in run.stages)
    return [
        f"`{name}`",
        f"{run.gpus} = {run.parallel.tensor} x {run.parallel.pipeline} x {run.data}",
        "all layers" if unfrozen == -1 else f"the top {unfrozen} layers",
        f"{fullest(run).total / GIB:.1f}",
        f"{generating / GIB:.1f} for {rows} rows",
        f"{bubble(run):.1%}",
        f"`{launch_line(run.gpus)} YOUR.MODULE`",
    ]


def _preset_shape(name: str) -> DecoderConfig:
    return read_run(read_config([name], "ppo"), vocabulary=GPT2_VOCABULARY).shape


def _row(columns) -> str:
    return f"| {' | '.join(columns)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
