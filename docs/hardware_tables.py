"""Writes the tables of docs/hardware.md: what `trlx plan` says of presets on some GPUs.

Usage: python -m docs.hardware_tables (some minutes)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from trlx.config import TRLConfig
from trlx.launch.plan.changes import Change, Verdict, cheapest, ladders_of
from trlx.launch.plan.phases import peak
from trlx.launch.plan.run import GPT2_VOCABULARY, Run, read_config
from trlx.launch.plan.tables import GIB, Planner
from trlx.launch.plan.work import EFFICIENCY, gpu_named
from trlx.model_presets import is_layer, layout

PAGE = Path(__file__).parent / "hardware.md"
MARK = "<!-- Below this line everything is written by docs/hardware_tables.py. -->\n"
RUNS = {
    "One GPU of 24 GB": (
        "rtx4090",
        (
            "ppo gpt2 1gpu",
            "ppo qwen3-0.6b 1gpu",
            "grpo qwen3-0.6b 1gpu",
            "grpo qwen3-1.7b lora 1gpu",
            "grpo qwen3-4b lora 1gpu",
            "grpo llama3.1-8b lora 1gpu",
            "sft qwen3-4b lora 1gpu",
            "dpo qwen3-4b lora 1gpu",
        ),
    ),
    "One GPU of 80 GB": (
        "h100",
        (
            "ppo qwen3-1.7b 1gpu",
            "grpo qwen3-1.7b 1gpu",
            "grpo qwen3-8b lora 1gpu",
            "sft qwen3-14b lora 1gpu",
            "dpo qwen3-8b lora 1gpu",
        ),
    ),
    "One node: 8 GPUs of 80 GB": (
        "h100",
        (
            "ppo qwen3-4b 8gpu",
            "grpo qwen3-8b 8gpu",
            "grpo qwen3-14b lora 8gpu",
            "sft llama3.1-8b 8gpu",
            "dpo llama3.1-8b 8gpu",
            "ppo qwen3-8b megatron 8gpu",
            "grpo qwen3-14b megatron 8gpu",
        ),
    ),
    "A cluster: 16 and 64 GPUs of 80 GB": (
        "h100",
        (
            "grpo qwen3-8b 16gpu",
            "grpo qwen3-14b 16gpu",
            "grpo qwen3-14b megatron 16gpu",
            "grpo qwen3-32b megatron 16gpu",
            "grpo qwen3-8b 64gpu",
            "ppo qwen3-32b megatron 64gpu",
            "grpo llama3.1-70b megatron 64gpu",
            "sft llama3.1-70b megatron 64gpu",
        ),
    ),
}
"""By heading, a GPU of `trlx plan --gpu` and what is planned on it."""
COLUMNS = ("preset", "settings", "GiB at most", "in the phase", "seconds a step")


def page() -> str:
    """The page as it should be: what is written by hand above the mark, tables below."""
    by_hand, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    return by_hand + mark + "".join(tables())


def tables() -> Iterator[str]:
    """Markdown, one table for each heading."""
    for heading, (gpu, runs) in RUNS.items():
        yield f"\n## {heading}\n\n{_row(COLUMNS)}{_row(['---'] * len(COLUMNS))}"
        yield from (row(words, gpu) for words in runs)


def row(words: str, gpu: str) -> str:
    """One line: a run as it is, or with the cheapest change that makes it fit."""
    speed = gpu_named(gpu)
    parts = words.split()
    config = read_config(parts)
    division = layout([part for part in parts if is_layer(part)])
    planner = Planner(division.gpus, GPT2_VOCABULARY, speed.memory * GIB, division.accelerate)

    def assess(settings: dict) -> Verdict:
        run, phases, work = planner(TRLConfig.update(config, settings))
        excess = sum(max(phase.total - planner.limit, 0) for phase in phases)
        return Verdict(peak(phases).total, excess, sum(work.seconds(speed, EFFICIENCY).values()))

    run, _, _ = planner(config)
    change = Change({}, assess({}))
    if change.verdict.excess:
        assert not isinstance(run, Run), f"{words} does not fit, and Megatron's layouts are not changed here"
        ladders = ladders_of(config, run.rows, run.rehearsal.layers, run.half, False)
        if not hasattr(config.method, "chunk_size"):  # only evaluations sample, all rows of a batch at once
            ladders.append([{"train.sampler": {"engine": "auto", "places": places}} for places in (32, 16, 8)])
        (change,) = cheapest(ladders, assess, count=1)
    _, phases, _ = planner(TRLConfig.update(config, change.settings))
    most = peak(phases)
    changed = f"`{change}`" if change.settings else ""
    return _row([f"`{words}`", changed, f"{most.total / GIB:.0f}", most.name, f"{change.verdict.seconds:.0f}"])


def _row(columns) -> str:
    return f"| {' | '.join(columns)} |\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # presets say how they are started
    PAGE.write_text(page(), encoding="utf-8")
