"""What a search over settings costs until examples/randomwalks is learned: trlx beside TRL, 12 settings each.

    python -m benchmarks.search_budget                        # all settings of all contenders
    python -m benchmarks.search_budget --settings 3 --limit 60 --contenders grpo trl-grpo

Each contender gets the same 12 settings: four learning rates times three sizes of a batch. All else is the same: the
batch is what was just sampled, and each walk is used once, which is TRL's default; eight walks from a start, a constant
learning rate, two seeds, and the walker that they start from. Every two steps the same function samples ten
walks from every start; a run ends when their mean optimality reaches 0.9, or after 80 steps. What counts is the CPU
seconds of all threads until then, without evaluations and without building the trainer, and their mean over the seeds.
A run that is in the file of results is not repeated, so the command can be stopped at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trlx
from benchmarks.speed.stopwatch import Stopwatch
from trlx.checkpoint import own_randomness
from trlx.data.prompts import PromptPipeline
from trlx.launch.demo.task import RandomWalks
from trlx.launch.demo.training import pretrain
from trlx.report.environment import environment
from trlx.trainer import accelerate

GROUP = 8
"""Walks from one start, for GRPO and RLOO."""
SEEDS = (1, 2)
ENOUGH = 0.9
"""Mean optimality."""
SAMPLES = 10
"""Walks from each start at an evaluation."""
PRESETS = {"ppo": "randomwalks", "grpo": "randomwalks-grpo", "rloo": "randomwalks-grpo"}
GRID = [(rate, batch) for batch in (128, 64, 256) for rate in (6.0e-4, 3.0e-4, 1.0e-3, 1.0e-4)]
"""Learning rates and walks of a batch, those of the middle first."""
ADAM = {"betas": [0.9, 0.95], "eps": 1.0e-8, "weight_decay": 1.0e-6}


class Judge:
    """Evaluates a model at some steps, and notes the CPU seconds until it was good enough."""

    def __init__(self, tokenizer: Any, interval: int):
        self.tokenizer, self.interval, self.task = tokenizer, interval, RandomWalks()
        self.watch, self.curve = Stopwatch(), {}

    def is_enough(self, step: int, model: torch.nn.Module) -> bool:
        """Call it after every step."""
        if step % self.interval:
            return False
        with self.watch.within("score"), own_randomness(0, step):
            self.curve[step] = self.optimality(model)
        return self.curve[step] >= ENOUGH

    @torch.no_grad()
    def optimality(self, model: torch.nn.Module) -> float:
        """Mean optimality of sampled walks."""
        trains = model.training
        model.eval()
        starts = self.tokenizer(self.task.prompts * SAMPLES, return_tensors="pt")
        walks = model.generate(**starts, max_new_tokens=self.task.max_length - 1, do_sample=True, top_k=0, top_p=1.0)
        model.train(trains)
        return statistics.mean(self.task.optimality(self.tokenizer.batch_decode(walks, skip_special_tokens=True)))

    def result(self) -> dict[str, Any]:
        """CPU seconds without evaluations, whether the last evaluation was good enough, and all of them by step."""
        found = self.watch.result()
        reached = max(self.curve.values(), default=0.0) >= ENOUGH
        return {"seconds": found["total"] - found["score"], "reached": reached, "curve": self.curve}


def ours(kind: str, model: Path, rate: float, batch: int, seed: int, steps: int, judge: Judge) -> None:
    """One run of trlx."""
    own = {"ppo_epochs": 1} if kind == "ppo" else {"num_generations": GROUP, "num_iterations": 1}
    own |= {"advantage": "rloo"} if kind == "rloo" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = trlx.load_preset(PRESETS[kind]).evolve(
            method={"num_rollouts": batch, "chunk_size": batch, **own},
            model={"model_path": str(model)},
            optimizer={"kwargs": {"lr": rate, **ADAM}},
            scheduler={"name": "constant", "kwargs": {}},
            train={"total_steps": steps, "epochs": steps, "batch_size": batch, "checkpoint_dir": folder, "seed": seed},
        )
        trainer = getattr(accelerate, config.train.trainer)(config, reward_fn=judge.task.reward_fn)
        trainer.add_prompt_pipeline(PromptPipeline(judge.task.prompts, 1, trainer.tokenizer))
        after_step = trainer.after_step

        def evaluate(metrics: dict[str, float]) -> None:
            after_step(metrics)
            if judge.is_enough(trainer.schedule.step, trainer.backend.policy.model):
                config.train.total_steps = trainer.schedule.step

        trainer.after_step, trainer.save = evaluate, lambda *_: None
        judge.watch.reset()
        trainer.learn()


def theirs(kind: str, model: Path, rate: float, batch: int, seed: int, steps: int, judge: Judge) -> None:
    """One run of TRL."""
    import datasets
    import trl

    build, settings = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[kind]

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return judge.task.optimality([start + walk for start, walk in zip(prompts, completions, strict=True)])

    class Evaluation(TrainerCallback):
        def on_train_begin(self, *_, **__):
            judge.watch.reset()

        def on_step_end(self, args, state, control, model, **_):
            control.should_training_stop |= judge.is_enough(state.global_step, model)

    with tempfile.TemporaryDirectory() as folder:
        args = settings(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="constant",
            adam_beta1=ADAM["betas"][0],
            adam_beta2=ADAM["betas"][1],
            weight_decay=ADAM["weight_decay"],
            per_device_train_batch_size=batch,
            num_generations=GROUP,
            max_completion_length=judge.task.max_length - 1,
            beta=0.0,
            top_k=0,
            seed=seed,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        build(
            AutoModelForCausalLM.from_pretrained(model),
            args=args,
            reward_funcs=reward,
            processing_class=judge.tokenizer,
            train_dataset=datasets.Dataset.from_list([{"prompt": start} for start in judge.task.prompts * 32]),
            callbacks=[Evaluation()],
        ).train()


CONTENDERS: dict[str, tuple[Callable[..., None], str]] = {
    "ppo": (ours, "ppo"),
    "grpo": (ours, "grpo"),
    "rloo": (ours, "rloo"),
    "trl-grpo": (theirs, "grpo"),
    "trl-rloo": (theirs, "rloo"),
}
"""By name: the function that runs it, and the method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--settings", type=int, default=len(GRID), help="how many, from the grid's middle out")
    parser.add_argument("--limit", type=int, default=80, help="most steps of a run")
    parser.add_argument("--interval", type=int, default=2, help="steps between evaluations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_budget.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Path("runs/search_budget/pretrained")
    if not (model / "config.json").is_file():
        pretrain(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    for (rate, batch), seed, name in itertools.product(GRID[: options.settings], SEEDS, options.contenders):
        fn, kind = CONTENDERS[name]
        runs = results["runs"].setdefault(name, {}).setdefault(f"{rate:g} {batch}", {})
        if str(seed) not in runs:
            judge = Judge(tokenizer, options.interval)
            fn(kind, model, rate, batch, seed, options.limit, judge)
            runs[str(seed)] = found = judge.result()
            results |= {"environment": environment(), "limit": options.limit, "summary": summary(results["runs"])}
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            steps = max(judge.curve, default=0)
            print(f"{name} {rate:g} {batch} {seed}: {found['seconds']:.2f} s, {steps} steps", flush=True)
    print(json.dumps(results.get("summary"), indent=1))


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each contender the best and the median CPU seconds of its settings, and each of ours by each of theirs.

    A setting has the mean of its seeds. If a run was not good enough, it counts as infinite, in the file as null.
    """
    found: dict[str, Any] = {}
    for name, settings in runs.items():
        seconds = sorted(
            statistics.mean(run["seconds"] if run["reached"] else float("inf") for run in seeds.values())
            for seeds in settings.values()
            if seeds
        )
        if not seconds:
            continue
        reached = sum(each < float("inf") for each in seconds)
        shown = {"best": seconds[0], "median": statistics.median(seconds)}
        found[name] = {"settings": len(seconds), "reached": reached} | {
            kind: value if value < float("inf") else None for kind, value in shown.items()
        }
    ratios = {}
    for mine, other in itertools.product(("ppo", "grpo", "rloo"), ("trl-grpo", "trl-rloo")):
        for kind in ("best", "median"):
            pair = [found.get(name, {}).get(kind) for name in (mine, other)]
            if all(pair):
                ratios[f"{mine} / {other}, {kind}"] = pair[0] / pair[1]
    return {**found, "ratios": ratios}


if __name__ == "__main__":
    main()
