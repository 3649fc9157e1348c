"""How much CPU time and memory PPO costs beside a plain PyTorch loop that does the same arithmetic.

    python -m benchmarks.ppo_speed                      # both workloads, 5 interleaved pairs each
    python -m benchmarks.ppo_speed --workload gpt2-small --pairs 3

Every run is a process of its own. A pair is one run of each kind, in turn; a ratio is of one pair (trlx / plain), given
as min, median and max. CPU seconds are of all threads, in the phases of PPO alone: imports, building the model and
saving it are not counted. Memory is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHASES = ("generate", "reward", "score", "update")


@dataclass(frozen=True)
class Workload:
    """Sizes of model and batches; `steps` optimizer steps are measured, the first `warm_up` collections are not."""

    layers: int
    width: int
    heads: int
    vocab: int
    prompts: int
    prompt_length: int
    new_tokens: int
    batch_size: int
    iterations: int
    lr: float
    warm_up: int = 1
    epochs: int = 4


WORKLOADS = {
    # the model and sizes of examples/randomwalks: 20 collections of 8 steps
    "randomwalks": Workload(6, 144, 12, 24, 128, 1, 9, 100, iterations=20, lr=3e-4),
    "gpt2-small": Workload(12, 768, 12, 50257, 16, 32, 48, 16, iterations=1, lr=1e-5, warm_up=0),
}


class Stopwatch:
    """CPU seconds by phase; `begin(None)` ends the last one."""

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self.since = None, 0.0

    def begin(self, phase: str | None) -> None:
        now = time.process_time()
        if self.phase is not None:
            self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def timed(self, phase: str, fn):
        """`fn`, with its time counted under `phase`."""

        def wrapped(*args, **kwargs):
            began = time.process_time()
            try:
                return fn(*args, **kwargs)
            finally:
                self.seconds[phase] += time.process_time() - began

        return wrapped


def model_config(load: Workload):
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=load.layers,
        n_embd=load.width,
        n_head=load.heads,
        vocab_size=load.vocab,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


def prompt_ids(load: Workload) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (load.prompts, load.prompt_length)
    return torch.randint(1, load.vocab, shape, generator=generator).tolist()


def even_share(ids: list[int]) -> float:
    """The reward of both kinds: the share of even token ids."""
    return sum(i % 2 == 0 for i in ids) / max(len(ids), 1)


def run_plain(load: Workload) -> dict[str, float]:
    import torch
    from transformers import GPT2LMHeadModel

    from benchmarks.plain_ppo import PlainPPO, Settings

    torch.manual_seed(0)
    settings = Settings(load.new_tokens, load.batch_size, load.epochs, load.lr, eos=0)
    ppo = PlainPPO(GPT2LMHeadModel(model_config(load)), settings)
    prompts = torch.tensor(prompt_ids(load))

    def reward(tokens, mask):
        new = tokens[:, load.prompt_length :]
        pairs = zip(new.tolist(), mask.tolist(), strict=True)
        return torch.tensor([even_share([i for i, used in zip(*row, strict=True) if used]) for row in pairs])

    watch = Stopwatch()
    for _ in range(load.warm_up):
        ppo.iteration(prompts, reward, watch.begin)
    watch, began = Stopwatch(), time.process_time()
    for _ in range(load.iterations):
        ppo.iteration(prompts, reward, watch.begin)
    return {**watch.seconds, "total": time.process_time() - began}


def run_trlx(load: Workload) -> dict[str, float]:
    from tests.builders import char_tokenizer
    from trlx.config import TRLConfig
    from trlx.data.prompts import PromptPipeline
    from trlx.trainer.accelerate import AcceleratePPOTrainer

    tokenizer = char_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<pad>"  # id 0, as in the plain loop
    per_iteration = load.epochs * -(-load.prompts // load.batch_size)
    steps = (load.warm_up + load.iterations) * per_iteration
    with tempfile.TemporaryDirectory() as folder:
        config = TRLConfig.from_dict(
            {
                "method": {
                    "name": "PPOConfig",
                    "ppo_epochs": load.epochs,
                    "num_rollouts": load.prompts,
                    "chunk_size": load.prompts,
                    "init_kl_coef": 0.05,
                    "gen_kwargs": {"max_new_tokens": load.new_tokens},
                },
                "model": {"model_path": model_config(load)},
                "tokenizer": {"tokenizer_path": tokenizer},
                "optimizer": {"name": "adamw", "kwargs": {"lr": load.lr}},
                "train": {
                    "total_steps": steps,
                    "seq_length": load.prompt_length + load.new_tokens,
                    "epochs": steps,
                    "batch_size": load.batch_size,
                    "checkpoint_interval": steps + 1,
                    "eval_interval": steps + 1,
                    "pipeline": "PromptPipeline",
                    "trainer": "AcceleratePPOTrainer",
                    "tracker": None,
                    "checkpoint_dir": folder,
                },
            }
        )

        def reward(samples, prompts, outputs, **kwargs):
            return [even_share([3 * len(output) + i for i in range(load.new_tokens)]) for output in outputs]

        trainer = AcceleratePPOTrainer(config, reward_fn=reward)
        trainer.add_prompt_pipeline(PromptPipeline(prompt_ids(load), load.prompt_length, tokenizer))
        return _measured(trainer, load.warm_up * per_iteration)


def _measured(trainer, first_step: int) -> dict[str, float]:
    """Trains without the save at the end; times everything after `first_step` steps, and the phases within."""
    watch = Stopwatch()
    trainer.save = lambda *_: None
    backend = trainer.backend
    trainer.sampler.generate = watch.timed("generate", trainer.sampler.generate)
    backend.evaluate = watch.timed("evaluate", backend.evaluate)
    backend.train_step = watch.timed("update", backend.train_step)
    began = {"at": time.process_time()}
    after_step = trainer.after_step

    def notice(metrics):
        after_step(metrics)
        if trainer.schedule.step == first_step:
            watch.seconds.update(dict.fromkeys(PHASES, 0.0))
            began["at"] = time.process_time()

    trainer.after_step = notice
    trainer.learn()
    total = time.process_time() - began["at"]
    # the reward runs in a thread of its own: what is left is the reward with texts, advantages, logging and bookkeeping
    watch.seconds["reward"] = total - sum(watch.seconds.values())
    return {**watch.seconds, "total": total}


def one_run(kind: str, workload: str) -> dict[str, float]:
    """One measured run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ppo_speed", "--kind", kind, "--workload", workload]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(workload: str, pairs: int) -> dict:
    runs = {"plain": [], "trlx": []}
    for _ in range(pairs):
        for kind, done in runs.items():
            done.append(one_run(kind, workload))
    medians = {
        kind: {name: statistics.median(run[name] for run in done) for name in done[0]} for kind, done in runs.items()
    }
    ratios = {}
    for name in ("total", "peak_mib"):
        both = sorted(b[name] / a[name] for a, b in zip(runs["plain"], runs["trlx"], strict=True))
        ratios[name] = {"min": both[0], "median": statistics.median(both), "max": both[-1]}
    return {"medians": medians, "ratios": ratios}


def show(workload: str, result: dict) -> None:
    print(f"\n{workload}: median CPU seconds")
    for kind, numbers in result["medians"].items():
        print(f"  {kind:6}", "  ".join(f"{name} {numbers[name]:.2f}" for name in (*PHASES, "total", "peak_mib")))
    for name, ratio in result["ratios"].items():
        print(f"  trlx / plain, {name}: " + "  ".join(f"{key} {value:.3f}" for key, value in ratio.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    parser.add_argument("--kind", choices=["plain", "trlx"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        run = {"plain": run_plain, "trlx": run_trlx}[options.kind]
        numbers = run(WORKLOADS[options.workload])
        print(json.dumps({**numbers, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    from benchmarks.environment import environment

    names = WORKLOADS if options.workload == "all" else [options.workload]
    results = {"environment": environment()}
    for name in names:
        results[name] = compare(name, options.pairs)
        show(name, results[name])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
