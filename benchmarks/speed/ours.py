"""trlx, measured around the calls of its sampler and its backend."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.speed.stopwatch import Stopwatch
from benchmarks.speed.workloads import Reward, Workload, answers, model_config, number_tokenizer, prompts, text_of
from trlx.batch import Rollout
from trlx.config import TRLConfig
from trlx.data.prompts import PromptPipeline
from trlx.trainer import accelerate
from trlx.trainer.base import Trainer

TRAINERS = {
    "ppo": accelerate.AcceleratePPOTrainer,
    "sampling": accelerate.AccelerateGRPOTrainer,
    "grpo": accelerate.AccelerateGRPOTrainer,
    "rloo": accelerate.AccelerateGRPOTrainer,
    "sft": accelerate.AccelerateSFTTrainer,
    "dpo": accelerate.AccelerateDPOTrainer,
    "reward": accelerate.AccelerateRewardTrainer,
}


def run(load: Workload) -> dict[str, Any]:
    """Trains (or samples), and returns what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        reward, watch = Reward(), Stopwatch()

        def reward_fn(outputs):
            # a thread of its own calls this, while the main thread waits for it
            with watch.within("reward"):
                return reward(outputs)

        trainer = trainer_of(load, folder, reward_fn)
        if load.task == "sampling":
            return _sample(trainer, load, watch)
        return {**_learn(trainer, load, watch), "lengths": sorted(reward.lengths)}


def trainer_of(load: Workload, folder: str, reward_fn: Callable[..., Any]) -> Trainer:
    """A trainer with its data, which writes to `folder`."""
    kind = TRAINERS[load.task]
    trainer = kind(TRLConfig.from_dict(_config(load, folder)), **({"reward_fn": reward_fn} if kind.online else {}))
    _feed(trainer, load)
    return trainer


def _config(load: Workload, folder: str) -> dict[str, Any]:
    steps = (load.warm_up + load.iterations) * load.steps
    trainer = TRAINERS[load.task]
    return {
        "method": _method(load),
        "model": {"model_path": model_config(load), "num_layers_unfrozen": load.unfrozen},
        "tokenizer": {"tokenizer_path": number_tokenizer(load)},
        "optimizer": {"name": "adamw", "kwargs": {"lr": load.lr}},
        "train": {
            "total_steps": steps,
            "seq_length": load.longest,
            "epochs": steps,
            "batch_size": load.batch_size,
            "checkpoint_interval": steps + 1,
            "eval_interval": steps + 1,
            "pipeline": "PromptPipeline",
            "trainer": trainer.__name__,
            "tracker": None,
            "checkpoint_dir": folder,
        },
    }


def _method(load: Workload) -> dict[str, Any]:
    offline = {"sft": {"name": "SFTConfig"}, "dpo": {"name": "DPOConfig"}, "reward": {"name": "RewardConfig"}}
    if load.task in offline:
        return offline[load.task]
    samples = load.rows * load.group
    gen_kwargs = {"max_new_tokens": load.new_tokens, "do_sample": True, "top_k": 0, "top_p": 1.0}
    method = {"num_rollouts": samples, "chunk_size": samples, "gen_kwargs": gen_kwargs}
    if load.task == "sampling":
        return {
            **method,
            "name": "GRPOConfig",
            "num_generations": 2,
            "kl_coef": 0.0,
        }  # a model alone, without reference and heads
    if load.task == "grpo":
        return {**method, "name": "GRPOConfig", "num_generations": load.group, "kl_coef": 0.04}
    if load.task == "rloo":
        kind = {"advantage": "rloo", "kl_coef": 0.05, "kl_in": "reward"}
        return {**method, "name": "GRPOConfig", "num_generations": load.group, **kind}
    return {**method, "name": "PPOConfig", "ppo_epochs": load.epochs, "init_kl_coef": 0.05}


def _feed(trainer: Trainer, load: Workload) -> None:
    if trainer.online:
        trainer.add_prompt_pipeline(PromptPipeline(prompts(load), load.prompt_length, trainer.tokenizer))
    elif load.task == "sft":
        samples = zip(prompts(load), answers(load), strict=True)
        eos = trainer.tokenizer.eos_token_id
        trainer.learn_from([Rollout(prompt[:1], [*prompt[1:], *answer, eos]) for prompt, answer in samples])
    else:
        names = ("prompt", "chosen", "rejected")
        rows = zip(prompts(load), answers(load), answers(load, seed=2), strict=True)
        samples = [dict(zip(names, map(text_of, row), strict=True)) for row in rows]
        trainer.make_experience([row | {"prompt": f"{row['prompt']} "} for row in samples], load.longest)


def _sample(trainer: Trainer, load: Workload, watch: Stopwatch) -> dict[str, Any]:
    watch.reset()
    with watch.within("generate"):
        samples = trainer.draw(prompts(load), trainer.rollout_sampling)
    return {**watch.result(), "lengths": sorted(len(sample.ids) for sample in samples)}


def _learn(trainer: Trainer, load: Workload, watch: Stopwatch) -> dict[str, float]:
    """Trains without the save at the end, and measures from the end of the warm-up on."""
    backend = trainer.backend
    step, after_step = backend.train_step, trainer.after_step

    def train_step(batch, *others):
        watch.tokens += int((batch.attention_mask if load.task == "reward" else batch.response_mask).sum())
        return step(batch, *others)

    def notice(metrics):
        after_step(metrics)
        if trainer.schedule.step == load.warm_up * load.steps:
            watch.reset()

    trainer.save = lambda *_: None
    trainer.sampler.generate = watch.timed("generate", trainer.sampler.generate)
    backend.evaluate = watch.timed("score", backend.evaluate)
    backend.train_step = watch.timed("update", train_step)
    trainer.after_step = notice
    watch.reset()
    trainer.learn()
    return watch.result()
