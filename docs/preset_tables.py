"""Writes the table of docs/presets.md: how many parameters each model has, and what each layout holds.

Usage: python -m docs.preset_tables
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trlx.config import TRLConfig
from trlx.launch.plan.layouts import fullest
from trlx.launch.plan.memory import cache, memory
from trlx.launch.plan.run import TRAINERS, read_run
from trlx.launch.plan.tables import GIB
from trlx.method_configs import MethodConfig, get_method
from trlx.model_presets import Layout, layouts, shape_of, tables
from trlx.models.decoder import blocks
from trlx.presets import load_preset

PAGE = Path(__file__).parent / "presets.md"
MARK = "<!-- Below this line everything is written by docs/preset_tables.py. -->\n"
TRAINS = {"full": "all weights", "lora": "`lora`", "megatron": "all weights, `megatron`"}
HALF, FLOAT = 2, 4
"""Bytes of a bfloat16 and of a float32."""


def page() -> str:
    """The page as it should be: what is written by hand above the mark, the table below."""
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + mark + "".join(rows())


def rows() -> Iterator[str]:
    """The table: one row for each model and way to train it."""
    scales = list(tables()["rows"])
    columns = ["model", "parameters", "trains", "fits on", *(f"`{gpus}gpu`" for gpus in scales)]
    yield f"\n{_row(columns)}{_row(['---'] * len(columns))}"
    for model in tables()["models"]:
        billions = f"{on_paper(model).num_parameters() / 1e9:.3f} billion"
        for kind, found in layouts(model).items():
            cells = [_cell(model, kind, found[gpus]) if gpus in found else "" for gpus in scales]
            fewest = f"{min(found)} GPU{'s' if min(found) > 1 else ''}"
            yield _row([f"`{model}`", billions, TRAINS[kind], fewest, *cells])


@functools.cache
def size(model: str, kind: str, gpus: int) -> float:
    """GiB of a layout on its fullest GPU; `kind` as in `layouts`."""
    config = load_preset("ppo", model, *([] if kind == "full" else [kind]), f"{gpus}gpu")
    held = planned(config, model) if kind == "megatron" else summed(config, on_paper(model), layouts(model)[kind][gpus])
    return held / GIB


@functools.cache
def on_paper(model: str) -> PreTrainedModel:
    """The model of transformers without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_of(model))


def planned(config: TRLConfig, model: str) -> float:
    """What ``trlx plan`` says of the NeMo trainers: bytes of the method that needs most, to update or to generate."""
    config = config.evolve(model={"model_path": shape_of(model)})
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


def summed(config: TRLConfig, empty: PreTrainedModel, layout: Layout) -> float:
    """Bytes that last on a process of Accelerate's, and keys and values of a chunk of rollouts; no activations.

    All weights: float32 weights, gradients, Adam's two moments and the reference, in parts under FSDP2, and a copy of
    all weights in bfloat16 while a pass runs. LoRA: the model in bfloat16, the adapter like weights that train.
    """
    weights, shape = empty.num_parameters(), empty.config
    if config.model.peft_config:
        held = HALF * weights + 4 * FLOAT * adapter_weights(empty, config.model.peft_config["r"])
    else:
        held = 5 * FLOAT * weights / (layout.gpus if layout.accelerate == "fsdp2" else 1) + HALF * weights
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    tokens = config.method.chunk_size * config.train.seq_length
    return held + tokens * shape.num_hidden_layers * 2 * heads * width * HALF


def adapter_weights(empty: PreTrainedModel, rank: int) -> int:
    """Weights of LoRA on all matrices of the blocks: two beside each, [in, rank] and [rank, out]."""
    matrices = [weight for weight in blocks(empty).parameters() if weight.ndim == 2]
    return rank * sum(sum(weight.shape) for weight in matrices)


def _cell(model: str, kind: str, layout: Layout) -> str:
    division = layout.accelerate or f"{layout.tensor} x {layout.pipeline}"
    return f"{division}: {size(model, kind, layout.gpus):.0f}"


def _row(columns) -> str:
    return f"| {' | '.join(columns)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
