"""How long the two stages of a pipeline wait for each other, beside (p - 1) / (m + p - 1) (arXiv:2104.04473, 2.2).

    python -m benchmarks.pipeline_bubble --out benchmarks/results/pipeline_bubble.json

Two processes of one thread each, on CPUs over gloo; steps of 1, 2, 4 and 8 microbatches in turn. Two numbers for each:

- by the clock: 1 - CPU seconds of forward and backward passes / seconds of the step. Whatever else runs on the machine
  lengthens the step, and a send is counted as waiting.
- replayed: every pass is given the CPU seconds that it took, and starts when its stage and what it reads are ready, in
  the order in which the stage ran it. This is the schedule's own idle time, with stages as unequal as they are; other
  programs do not change it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STAGES = 2
MICROBATCHES = (1, 2, 4, 8)
MODEL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
LENGTH, ROWS, VOCABULARY = 128, 4, 40


@dataclass
class Passes:
    """The forward and backward passes of one step on one stage: ("F" or "B", CPU seconds), in the order they ran."""

    ran: list[tuple[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    """Of the whole step, by the clock."""

    @property
    def busy(self) -> float:
        return sum(seconds for _, seconds in self.ran)


def predicted(stages: int, microbatches: int) -> float:
    """The share of a step in which each of several equal stages waits."""
    return (stages - 1) / (microbatches + stages - 1)


def replay(stages: list[list[tuple[str, float]]]) -> float:
    """Seconds from the first pass's start to the last one's end, if nothing but the schedule makes a stage wait.

    A forward pass needs that of the stage before, a backward pass that of the stage behind; on each stage passes run
    in the order given, the n-th of a kind for the n-th microbatch.
    """
    ends: dict[tuple[str, int, int], float] = {}
    free, at = [0.0] * len(stages), [0] * len(stages)
    counts = [{"F": 0, "B": 0} for _ in stages]
    while any(position < len(ran) for position, ran in zip(at, stages, strict=True)):
        moved = False
        for stage, ran in enumerate(stages):
            if at[stage] == len(ran):
                continue
            kind, seconds = ran[at[stage]]
            number = counts[stage][kind]
            before = stage - 1 if kind == "F" else stage + 1
            if 0 <= before < len(stages) and (kind, before, number) not in ends:
                continue
            free[stage] = max(free[stage], ends.get((kind, before, number), 0.0)) + seconds
            ends[kind, stage, number] = free[stage]
            counts[stage][kind] += 1
            at[stage] += 1
            moved = True
        if not moved:
            raise ValueError("The passes wait for each other: this is no order that a pipeline can run in")
    return max(free)


def run_stage(folder: Path, repetitions: int) -> None:
    """One process: every step's passes, written into `folder`."""
    import torch

    torch.set_num_threads(1)
    from trlx.backends.megatron.cpu import prepare_engine

    prepare_engine()
    step = _step()
    step(1)
    found: dict[int, list[dict[str, Any]]] = {m: [] for m in MICROBATCHES}
    for _ in range(repetitions):
        for microbatches in MICROBATCHES:
            passes = step(microbatches)
            found[microbatches].append({"ran": passes.ran, "seconds": passes.seconds})
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def _step() -> Any:
    """A function that runs one forward and backward of so many microbatches and returns its `Passes`."""
    import torch
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import schedules
    from transformers import LlamaConfig

    from benchmarks.megatron_memory import Case, batch, build, scored
    from trlx.backends.megatron.schedule import run_forward_backward

    model = LlamaConfig(**MODEL, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False)
    case = Case(model, {"pipeline_model_parallel_size": STAGES}, rows=ROWS, length=LENGTH, response=LENGTH - 1)
    backend, _ = build(case)
    passes = Passes()
    for kind, name in (("F", "forward_step"), ("B", "backward_step")):
        setattr(schedules, name, _timed(getattr(schedules, name), kind, passes))
    one = batch(Case(model, rows=ROWS, microbatches=1, length=LENGTH, response=LENGTH - 1))

    def step(microbatches: int) -> Passes:
        for chunk in backend.wrapped:
            chunk.zero_grad_buffer()
        dist.barrier()
        passes.ran, began = [], time.perf_counter()
        run_forward_backward(backend.wrapped, [one] * microbatches, scored)
        passes.seconds = time.perf_counter() - began
        return passes

    torch.manual_seed(0)
    return step


def _timed(call: Any, kind: str, passes: Passes) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        result = call(*args, **kwargs)
        passes.ran.append((kind, time.thread_time() - began))
        return result

    return timed


def measure(repetitions: int) -> list[dict[str, Any]]:
    """Per number of microbatches: what is predicted, and what each way of measuring gives."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(STAGES)]
        command += ["-m", "benchmarks.pipeline_bubble", "--repetitions", str(repetitions)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--folder", folder], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        stages = [json.loads((Path(folder) / f"{stage}.json").read_text()) for stage in range(STAGES)]
    return [_summary(m, [stage[str(m)] for stage in stages]) for m in MICROBATCHES]


def _summary(microbatches: int, stages: list[list[dict[str, Any]]]) -> dict[str, Any]:
    replayed, by_clock, busy = [], [], []
    for steps in zip(*stages, strict=True):
        works = [sum(seconds for _, seconds in step["ran"]) for step in steps]
        length = replay([[tuple(ran) for ran in step["ran"]] for step in steps])
        replayed.append(1 - sum(works) / len(works) / length)
        # the stages meet before a step: the longest of them has seen all of it
        by_clock.append(1 - sum(works) / len(works) / max(step["seconds"] for step in steps))
        busy.append(works)
    return {
        "microbatches": microbatches,
        "predicted": predicted(STAGES, microbatches),
        "replayed": spread(replayed),
        "by_clock": spread(by_clock),
        "cpu_seconds_of_stages": [statistics.median(stage) for stage in zip(*busy, strict=True)],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        run_stage(options.folder, options.repetitions)
        return
    from trlx.report.environment import environment

    before = os.getloadavg()[0]
    steps = measure(options.repetitions)
    for step in steps:
        ways = "  ".join(
            f"{way} " + " / ".join(f"{value:.3f}" for value in step[way].values()) for way in ("replayed", "by_clock")
        )
        print(f"{step['microbatches']} microbatches: predicted {step['predicted']:.3f}  {ways} (min / median / max)")
    model = {**MODEL, "length": LENGTH, "rows": ROWS, "stages": STAGES}
    load = {"load_average_before": before}
    results = {"environment": environment() | load, "model": model, "repetitions": options.repetitions, "steps": steps}
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
