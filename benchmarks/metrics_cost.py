"""How much of an optimizer step goes into metrics, in CPU seconds: ``python -m benchmarks.metrics_cost [WORKLOAD]``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from unittest.mock import patch

from benchmarks.speed.ours import trainer_of
from benchmarks.speed.workloads import WORKLOADS, Reward, Workload, tiny
from trlx.backends import accelerate
from trlx.methods import grpo, ppo, preferences, reward, sft

METRICS = ("mean_of", "means_of", "spread_of", "pack", "merge_packed", "finish")
"""The functions that only make numbers to report; what they call themselves is counted with them."""


def shares(load: Workload) -> Counter[str]:
    """CPU seconds of whole optimizer steps ("step") and of the metrics in them ("metrics")."""
    seconds: Counter[str] = Counter()

    def timed(name: str, fn: Callable) -> Callable:
        @wraps(fn)
        def call(*args, **kwargs):
            began = time.process_time()
            try:
                return fn(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - began

        return call

    with tempfile.TemporaryDirectory() as folder:
        score = Reward()
        trainer = trainer_of(load, folder, lambda outputs: score(outputs))
        for module in (accelerate, grpo, ppo, preferences, reward, sft):
            for name in METRICS:
                if hasattr(module, name):
                    patch.object(module, name, timed("metrics", getattr(module, name))).start()
        patch.object(trainer.backend, "train_step", timed("step", trainer.backend.train_step)).start()
        try:
            trainer.learn()
        finally:
            patch.stopall()
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS, nargs="?", default="gpt2-small")
    parser.add_argument("--tiny", action="store_true", help="sizes of a second, to try the command itself")
    asked = parser.parse_args()
    load = WORKLOADS[asked.workload]
    found = shares(tiny(load) if asked.tiny else load)
    metrics, step = found["metrics"], found["step"]
    print(f"{asked.workload}: {metrics:.3f} of {step:.3f} CPU seconds, {metrics / step:.2%}")
