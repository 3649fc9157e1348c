"""How much CPU time and memory trlx takes beside others that do the same work.

    python -m benchmarks.speed gpt2-small-ragged --pairs 3
    python -m benchmarks.speed grpo-ragged --out benchmarks/results/speed_grpo-ragged.json

Each run is a process of its own with one thread. The contenders take turns, and every turn also measures what the
machine can do at most. CPU seconds are of all threads, in the phases of training alone: imports, building the model and
saving it are not counted. "score" is the passes of policy and reference before the updates, "rest" what is in no phase.
Memory is the peak of the process. A ratio is of one turn (trlx / contender), given as min, median and max.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.speed.stopwatch import PHASES
from benchmarks.speed.workloads import WORKLOADS, Workload, tiny
from trlx.report.environment import environment

ROOT = Path(__file__).parents[2]
CONTENDERS = {
    "trlx": ("benchmarks.speed.ours", {}),
    "plain": ("benchmarks.speed.plain", {}),
    "generate": ("benchmarks.speed.generate", {}),
    "trl": ("benchmarks.speed.trl", {}),
    "trl-packed": ("benchmarks.speed.trl", {"packing": True}),
}
"""The module with ``run(load)``, and further arguments."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def contenders(load: Workload) -> list[str]:
    """trlx, and those it is compared with that are installed."""
    return ["trlx", *(name for name in load.contenders if not name.startswith("trl") or find_spec("trl"))]


def runner(contender: str) -> Callable[[Workload], dict[str, Any]]:
    """The function that does the work, in this process. It returns CPU seconds by phase, ``total``, ``tokens`` (trained
    response tokens) and ``lengths`` (of sampled responses, sorted)."""
    module, arguments = CONTENDERS[contender]
    return partial(import_module(module).run, **arguments)


def in_process(*arguments: str) -> dict[str, Any]:
    """What ``python -m benchmarks.speed`` with these arguments prints last."""
    command = [sys.executable, "-m", "benchmarks.speed", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(workload: str, pairs: int, *options: str) -> dict[str, Any]:
    """Runs all contenders in turn, `pairs` times; every other time in reverse order.

    Raises:
        RuntimeError: a run fails, or the contenders did not do the same work.
    """
    names = contenders(WORKLOADS[workload])
    runs: dict[str, list[dict]] = {name: [] for name in names}
    limits = []
    for turn in range(pairs):
        limits.append(in_process(workload, "--limits"))
        for name in names if turn % 2 == 0 else reversed(names):
            runs[name].append(in_process(workload, "--contender", name, *options))
    if WORKLOADS[workload].ragged:
        check_alike({name: done[0] for name, done in runs.items()})
    medians = {name: {key: statistics.median(run[key] for run in done) for key in (*PHASES, "total", "peak_mib")}
               for name, done in runs.items()}  # fmt: skip
    return {
        "limits": {name: spread([found[name] for found in limits]) for name in limits[0]},
        "tokens": runs["trlx"][0]["tokens"],
        "lengths": runs["trlx"][0]["lengths"],
        "medians": medians,
        "ratios": {name: ratios(runs["trlx"], runs[name]) for name in names[1:]},
    }


def check_alike(first: dict[str, dict[str, Any]]) -> None:
    """Raises a RuntimeError if contenders sampled responses of other lengths, or trained other numbers of tokens."""
    for name, found in first.items():
        for key in ("lengths", "tokens"):
            if found[key] != first["trlx"][key]:
                raise RuntimeError(f"{key} of {name} are {found[key]}, of trlx {first['trlx'][key]}")


def ratios(ours: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """trlx / contender: the whole, memory, and phases that both have."""
    found = {}
    for key in ("total", *PHASES[:-1], "peak_mib"):
        if min(run[key] for run in (*ours, *others)) > 0.05:
            found[key] = spread([mine[key] / theirs[key] for mine, theirs in zip(ours, others, strict=True)])
    return found


def spread(numbers: list[float]) -> dict[str, float]:
    """min, median and max."""
    return {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}


def show(workload: str, result: dict[str, Any]) -> None:
    """Prints a comparison."""
    print(f"{workload}: median CPU seconds, {result['tokens']} trained tokens")
    for name, numbers in result["medians"].items():
        print(f"  {name:10}", "  ".join(f"{key} {value:.2f}" for key, value in numbers.items()))
    for name, found in result["ratios"].items():
        for key, ratio in found.items():
            print(f"  trlx / {name}, {key}: " + "  ".join(f"{which} {value:.3f}" for which, value in ratio.items()))
    for name, limit in result["limits"].items():
        print(f"  {name}: " + "  ".join(f"{which} {value:.1f}" for which, value in limit.items()))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    if options.limits:
        from benchmarks.speed.limits import limits

        return limits()
    load = WORKLOADS[options.workload]
    if options.no_warm_up:
        load = replace(load, warm_up=0)
    found = runner(options.contender)(tiny(load) if options.tiny else load)
    return {**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument(
        "--pairs", type=int, choices=range(1, 100), default=3, metavar="N", help="runs of each contender"
    )
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parser.add_argument("--tiny", action="store_true", help="sizes of a second, to try the benchmark itself")
    parser.add_argument("--no-warm-up", action="store_true", help="half the time, but the first collection is measured")
    parser.add_argument("--contender", choices=CONTENDERS, help="run this one alone, in this process")
    parser.add_argument("--limits", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender or options.limits:
        print(json.dumps(measured(options)))
        return
    if len(contenders(WORKLOADS[options.workload])) <= len(WORKLOADS[options.workload].contenders):
        print("TRL is not installed, so its trainers are left out: pip install 'trlx[bench]'")
    flags = {"--tiny": options.tiny, "--no-warm-up": options.no_warm_up}
    result = compare(options.workload, options.pairs, *(flag for flag, given in flags.items() if given))
    show(options.workload, result)
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), options.workload: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
