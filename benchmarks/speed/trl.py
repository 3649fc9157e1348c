"""TRL's trainers, in float32 without gradient checkpointing, as trlx trains by default; otherwise as they come."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback

from benchmarks.speed.stopwatch import Stopwatch
from benchmarks.speed.workloads import (
    EOS,
    Reward,
    Workload,
    answers,
    model_config,
    number_tokenizer,
    prompts,
    text_of,
)


def run(load: Workload, packing: bool = False) -> dict[str, Any]:
    """Trains, and returns what was measured. Everything but sampling and scoring counts as update.

    Raises:
        ImportError: TRL is not installed.
    """
    try:
        import trl
    except ImportError:
        raise ImportError("TRL is not installed: pip install 'trlx[bench]' to measure its trainers") from None
    torch.manual_seed(0)
    reward, watch = Reward(), Stopwatch(rest="update")
    with tempfile.TemporaryDirectory() as folder:
        build = {"sft": _sft, "grpo": _online, "rloo": _online, "dpo": _pairs, "reward": _pairs}[load.task]
        given = {"model": _model(load, folder), "processing_class": number_tokenizer(load)}
        trainer = build(trl, load, {**_common(load), "output_dir": folder}, given, reward, packing)
        _watch(trainer, load, watch)
        trainer.train()
    return {**watch.result(), "lengths": sorted(reward.lengths)}


def _model(load: Workload, folder: str) -> PreTrainedModel:
    """A model that was loaded from a folder, because TRL loads the reference from there."""
    config = model_config(load)
    config.num_labels = 1
    loader = AutoModelForSequenceClassification if load.task == "reward" else AutoModelForCausalLM
    loader.from_config(config).save_pretrained(folder)
    return loader.from_pretrained(folder)


def _common(load: Workload) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": load.batch_size,
        "learning_rate": load.lr,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _sft(trl: Any, load: Workload, common: dict, given: dict, reward: Reward, packing: bool) -> Any:
    import datasets

    rows = [{"input_ids": [*prompt, *answer, EOS]} for prompt, answer in zip(prompts(load), answers(load), strict=True)]
    # packing makes fewer rows: with fewer in a batch, there are about as many optimizer steps
    packed = {"packing": True, "per_device_train_batch_size": load.batch_size * 5 // 8} if packing else {}
    return trl.SFTTrainer(
        **given,
        args=trl.SFTConfig(**{**common, "max_length": load.longest, "num_train_epochs": load.iterations, **packed}),
        train_dataset=datasets.Dataset.from_list(rows),
    )


def _online(trl: Any, load: Workload, common: dict, given: dict, reward: Reward, packing: bool) -> Any:
    import datasets

    def judge(completions: list[str], **others: Any) -> list[float]:
        return reward(completions)

    trainer, settings = {
        "grpo": (trl.GRPOTrainer, lambda **given: trl.GRPOConfig(beta=0.04, loss_type="grpo", **given)),
        "rloo": (trl.RLOOTrainer, lambda **given: trl.RLOOConfig(beta=0.05, **given)),
    }[load.task]
    args = settings(
        **common,
        max_steps=(load.warm_up + load.iterations) * load.steps,
        num_generations=load.group,
        steps_per_generation=load.steps,
        max_completion_length=load.new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return trainer(
        **given,
        reward_funcs=judge,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": text_of(ids)} for ids in prompts(load)]),
    )


def _pairs(trl: Any, load: Workload, common: dict, given: dict, reward: Reward, packing: bool) -> Any:
    import datasets

    trainer, settings = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[load.task]
    rows = zip(prompts(load), answers(load), answers(load, seed=2), strict=True)
    texts = [dict(zip(("prompt", "chosen", "rejected"), map(text_of, row), strict=True)) for row in rows]
    spaced = [{"prompt": f"{row['prompt']} ", **{k: f"{row[k]} " for k in ("chosen", "rejected")}} for row in texts]
    pairs = {**common, "per_device_train_batch_size": load.batch_size // 2}
    return trainer(
        **given,
        args=settings(**pairs, max_length=load.longest, num_train_epochs=load.iterations),
        train_dataset=datasets.Dataset.from_list(spaced),
    )


def _watch(trainer: Any, load: Workload, watch: Stopwatch) -> None:
    """Measures from the end of the warm-up to the end of training."""
    compute = trainer.compute_loss

    def compute_loss(model, inputs, *others, **named):
        watch.tokens += _trained_tokens(inputs)
        return compute(model, inputs, *others, **named)

    class Boundaries(TrainerCallback):
        def on_train_begin(self, *_, **__):
            watch.reset()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == load.warm_up * load.steps:
                watch.reset()

    trainer.compute_loss = compute_loss
    trainer.add_callback(Boundaries())
    phases = {"_generate": "generate", "_calculate_rewards": "reward", "_generate_and_score_completions": "score"}
    for name, phase in phases.items():
        if hasattr(trainer, name):
            setattr(trainer, name, watch.timed(phase, getattr(trainer, name)))


def _trained_tokens(inputs: dict[str, Any]) -> int:
    if "labels" in inputs:
        return int((inputs["labels"][:, 1:] != -100).sum())
    mask = inputs["completion_mask" if "completion_mask" in inputs else "attention_mask"]
    return int(mask.sum())
