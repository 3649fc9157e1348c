"""Writes the table of docs/presets.md: how many parameters each model has, and what each layout holds.

Usage: python -m docs.preset_tables
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trlx.config import TRLConfig
from trlx.launch.plan.accelerate import AccelerateRun, Launch
from trlx.launch.plan.layouts import fullest
from trlx.launch.plan.memory import cache, memory
from trlx.launch.plan.phases import peak
from trlx.launch.plan.rehearsal import Rehearsal
from trlx.launch.plan.run import TRAINERS, read_run
from trlx.launch.plan.tables import GIB
from trlx.method_configs import MethodConfig, get_method
from trlx.model_presets import Layout, layouts, shape_of, tables
from trlx.presets import load_preset

PAGE = Path(__file__).parent / "presets.md"
MARK = "<!-- Below this line everything is written by docs/preset_tables.py. -->\n"
TRAINS = {"full": "all weights", "lora": "`lora`", "megatron": "all weights, `megatron`"}
Size = Callable[[str, str, int], float]


def page(size: Size | None = None) -> str:
    """The page as it should be: what is written by hand above the mark, the table below."""
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + mark + "".join(rows(size or planned_size))


def rows(size: Size) -> Iterator[str]:
    """The table: one row for each model and way to train it. `size` gives the GiB of a layout."""
    scales = list(tables()["rows"])
    columns = ["model", "parameters", "trains", "fits on", *(f"`{gpus}gpu`" for gpus in scales)]
    yield f"\n{_row(columns)}{_row(['---'] * len(columns))}"
    for model in tables()["models"]:
        billions = f"{on_paper(model).num_parameters() / 1e9:.3f} billion"
        for kind, found in layouts(model).items():
            cells = [_cell(found[gpus], size(model, kind, gpus)) if gpus in found else "" for gpus in scales]
            fewest = f"{min(found)} GPU{'s' if min(found) > 1 else ''}"
            yield _row([f"`{model}`", billions, TRAINS[kind], fewest, *cells])


def written_sizes() -> dict[tuple[str, str, int], float]:
    """The GiB that the page shows, by model, way to train it and number of GPUs."""
    kinds, found = {trains: kind for kind, trains in TRAINS.items()}, {}
    for line in PAGE.read_text(encoding="utf-8").partition(MARK)[2].splitlines()[3:]:
        model, _, trains, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shown = zip(tables()["rows"], cells, strict=True)
        found |= {(model.strip("`"), kinds[trains], gpus): float(c.split(": ")[1]) for gpus, c in shown if c}
    return found


@functools.cache
def planned_size(model: str, kind: str, gpus: int) -> float:
    """GiB of a layout on its fullest GPU, as ``trlx plan`` says; `kind` as in `layouts`. On Accelerate, for PPO."""
    config = load_preset("ppo", model, *([] if kind == "full" else [kind]), f"{gpus}gpu")
    config = config.evolve(model={"model_path": shape_of(model)})
    if kind == "megatron":
        return of_methods(config) / GIB
    launch = Launch.read(layouts(model)[kind][gpus].accelerate, gpus)
    return peak(AccelerateRun(config, launch, 80 * GIB, _rehearsals(model, kind)).phases()).total / GIB


@functools.cache
def _rehearsals(model: str, kind: str) -> dict[str, Rehearsal]:
    """Shared by the layouts of a model."""
    return {}


@functools.cache
def on_paper(model: str) -> PreTrainedModel:
    """The model of transformers without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_of(model))


def of_methods(config: TRLConfig) -> float:
    """Bytes of the NeMo trainer of the method that needs most, to update or to generate."""
    runs = [read_run(dataclasses.replace(config, method=method)) for method in methods(config.train.seq_length // 2)]
    chunk, updating = config.method.chunk_size, [fullest(run).total for run in runs]
    stages = [(run, stage) for run in runs for stage in run.stages]
    return max(*updating, *(memory(*each).lasting + cache(*each, chunk, each[0].length) for each in stages))


@functools.cache
def methods(new_tokens: int) -> list[MethodConfig]:
    """The settings of every method that has a NeMo trainer, with responses of `new_tokens` tokens."""
    found = [get_method(name)() for name in TRAINERS]
    for method in found:
        if "gen_kwargs" in vars(method):
            method.gen_kwargs["max_new_tokens"] = new_tokens
    return found


def _cell(layout: Layout, size: float) -> str:
    return f"{layout.accelerate or f'{layout.tensor} x {layout.pipeline}'}: {size:.0f}"


def _row(columns) -> str:
    return f"| {' | '.join(columns)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
