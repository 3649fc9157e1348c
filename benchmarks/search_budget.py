"""What a search over settings costs until examples/randomwalks is learned: trlx beside TRL, 12 settings each.

    python -m benchmarks.search_budget                        # all settings of all contenders
    python -m benchmarks.search_budget --settings 3 --limit 60 --contenders grpo trl-grpo

Each contender gets the same number of settings: four learning rates times three values of a second setting, responses
to a prompt for GRPO and RLOO, passes over a collection for PPO. All else is the same: 256 walks in a collection,
batches of 128, a constant learning rate, the seed, and the walker that they start from. Every four steps the same
function samples ten walks from every start; a run ends when their mean optimality reaches 0.9, or after 160 steps. What
counts is the CPU seconds of all threads until then, without evaluations and without building the trainer. A run that is
in the file of results is not repeated, so the command can be stopped at any time.
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
from benchmarks.environment import environment
from benchmarks.speed.stopwatch import Stopwatch
from examples.randomwalks.sft_randomwalks import pretrain
from examples.randomwalks.task import RandomWalks
from trlx.checkpoint import own_randomness
from trlx.data.prompts import PromptPipeline
from trlx.trainer import accelerate

RATES = (1.0e-4, 3.0e-4, 6.0e-4, 1.0e-3)
GROUPS = (4, 8, 16)
PASSES = (1, 2, 4)
ENOUGH = 0.9
"""Mean optimality."""
COLLECTION, BATCH, ROUNDS = 256, 128, 2
"""Walks of a collection and of a batch; passes over a collection of GRPO and RLOO."""
SAMPLES = 10
"""Walks from each start at an evaluation."""
PRESETS = {"ppo": "randomwalks", "grpo": "randomwalks-grpo", "rloo": "randomwalks-grpo"}
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


def ours(kind: str, model: Path, rate: float, second: int, steps: int, judge: Judge) -> None:
    """One run of trlx."""
    own = {"ppo_epochs": second} if kind == "ppo" else {"num_generations": second, "num_iterations": ROUNDS}
    own |= {"advantage": "rloo"} if kind == "rloo" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = trlx.load_preset(PRESETS[kind]).evolve(
            method={"num_rollouts": COLLECTION, "chunk_size": COLLECTION, **own},
            model={"model_path": str(model)},
            optimizer={"kwargs": {"lr": rate, **ADAM}},
            scheduler={"name": "constant", "kwargs": {}},
            train={"total_steps": steps, "epochs": steps, "batch_size": BATCH, "checkpoint_dir": folder},
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


def theirs(kind: str, model: Path, rate: float, second: int, steps: int, judge: Judge) -> None:
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
            per_device_train_batch_size=BATCH,
            steps_per_generation=COLLECTION // BATCH,
            num_iterations=ROUNDS,
            num_generations=second,
            max_completion_length=judge.task.max_length - 1,
            beta=0.0,
            top_k=0,
            seed=1000,
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


CONTENDERS: dict[str, tuple[Callable[..., None], str, tuple[int, ...]]] = {
    "ppo": (ours, "ppo", PASSES),
    "grpo": (ours, "grpo", GROUPS),
    "rloo": (ours, "rloo", GROUPS),
    "trl-grpo": (theirs, "grpo", GROUPS),
    "trl-rloo": (theirs, "rloo", GROUPS),
}
"""By name: the function that runs it, the method, and the values of the second setting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--settings", type=int, default=len(RATES) * 3, help="how many, from the grid's middle out")
    parser.add_argument("--limit", type=int, default=160, help="most steps of a run")
    parser.add_argument("--interval", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_budget.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Path("runs/search_budget/pretrained")
    if not (model / "config.json").is_file():
        pretrain(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    for number, name in itertools.product(range(options.settings), options.contenders):
        fn, kind, seconds = CONTENDERS[name]
        rate, second = grid(seconds)[number]
        runs = results["runs"].setdefault(name, {})
        key = f"{rate:g} {second}"
        if key not in runs:
            judge = Judge(tokenizer, options.interval)
            fn(kind, model, rate, second, options.limit, judge)
            runs[key] = judge.result()
            results |= {"environment": environment(), "limit": options.limit, "summary": summary(results["runs"])}
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{name} {key}: {runs[key]['seconds']:.2f} s, {max(judge.curve, default=0)} steps", flush=True)
    print(json.dumps(results.get("summary"), indent=1))


def grid(seconds: tuple[int, ...]) -> list[tuple[float, int]]:
    """All pairs of a learning rate and a value of the second setting, those of the grid's middle first."""
    rates = (RATES[2], RATES[1], RATES[3], RATES[0])
    return [(rate, second) for second in (seconds[1], seconds[0], seconds[2]) for rate in rates]


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each contender the best and the median CPU seconds; a run that was not good enough counts as infinite."""
    found = {}
    for name, settings in runs.items():
        seconds = sorted(run["seconds"] if run["reached"] else float("inf") for run in settings.values())
        median = statistics.median(seconds)
        reached = sum(run["reached"] for run in settings.values())
        best = seconds[0] if reached else None
        found[name] = {"settings": len(seconds), "reached": reached, "best": best}
        found[name]["median"] = median if median < float("inf") else None
    return found


if __name__ == "__main__":
    main()
