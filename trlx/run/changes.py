"""What happens when a run resumes with other settings, data or processes than its checkpoint was written with."""

from __future__ import annotations

from typing import Any

from trlx.backends.base import Backend
from trlx.config import TRLConfig, flat
from trlx.sampling.base import ALSO_CALLED

EXACT = {
    f"config.{name}"
    for name in """train.total_steps train.epochs train.checkpoint_interval train.keep_checkpoints train.eval_interval
        train.checkpoint_dir train.resume_from_checkpoint train.tracker train.logging_dir train.project_name
        train.run_name train.entity_name train.group_name train.tags train.rollout_logging_dir train.save_best
        train.save_optimizer train.reward_timeout train.gradient_checkpointing train.offload_optimizer
        train.async_save train.record_steps train.push_to_hub train.hub_private model.model_path""".split()
}
"""Settings that change no number. (`identity` has the model's weights and the learning-rate schedule.)"""

ADAPTED = {
    "data": "offline the present pass restarts on the new data; online the present rollouts stay, and the next prompts "
    "are the new ones",
    "data_processes": "the present pass goes on at its next row, in batches of all processes' rows; random numbers "
    "differ",
    "model": "the trained weights are the checkpoint's; the frozen ones, and the reference policy, are this model's",
    "schedule": "the learning rate goes on at the run's step of the new schedule",
    "config.method": "in use from here on; the present rollouts keep their advantages",
    "config.method.chunk_size": "in use from the next collection on, whose random numbers may differ",
    "config.method.gen_kwargs": "in use from here on; PPO drops present rollouts of another temperature",
    "config.method.gen_experience_kwargs": "in use from here on; PPO drops present rollouts of another temperature",
    "config.method.init_kl_coef": "a fixed coefficient takes the new value, an adaptive one keeps its present value",
    "config.method.num_rollouts": "in use from the next collection on",
    "config.method.ppo_epochs": "the present rollouts get that many passes in all",
    "config.method.ref_std": "in use from the next collection on; null keeps the present value",
    "config.optimizer": "in use from here on",
    "config.scheduler": "the learning rate goes on at the run's step of the new schedule",
    "config.train.batch_size": "the present pass goes on at its next row, in batches of the new size",
    "config.model.num_layers_unfrozen": "the checkpoint fits only where the same weights train",
    "config.train.cache_hidden_states": "numbers are the same up to rounding",
    "config.train.rollouts_ahead": "in use from the next collection on",
    "config.train.sampler": "responses are drawn in the new way from here on",
    "config.train.guards": "in use from here on",
    "config.train.max_grad_norm": "in use from here on",
    "config.train.minibatch_size": "numbers are the same up to rounding; dropout masks differ",
    "config.train.tokens_per_microbatch": "numbers are the same up to rounding; dropout masks differ",
    "config.train.compile": "numbers are the same up to rounding; dropout masks differ",
    "config.train.packing": "numbers are the same up to rounding; dropout masks differ",
    "config.train.mixed_precision": "weights stay as they are, results are rounded differently",
    "config.train.seed": "rows and prompts come in another order; in the present pass some may come twice, some never",
}
"""What is done about a change, by the setting's name or the section it is in."""

REFUSED = {
    "backend": "train.trainer is of another backend, which cannot read it",
    "config.method.name": "it belongs to another method",
}
"""Changes with which a checkpoint cannot be resumed, and why."""

AVERAGES = {
    **dict.fromkeys(("adam", "adamw", "fused_adam", "distributed_fused_adam"), "adam"),
    **dict.fromkeys(("adam_8bit_bnb", "adamw_8bit_bnb"), "8bit"),
}
"""Optimizers with one value here can read each other's running averages."""


def identity(config: TRLConfig, backend: Backend, data: str) -> dict[str, Any]:
    """What must stay the same so that a resumed run gives the same numbers; `data` is a hash of the data."""
    plain, sampler = config.to_json(), config.train.sampler
    sampler = {"engine": "auto"} | ({"engine": sampler} if isinstance(sampler, str) else dict(sampler))
    plain["train"]["sampler"] = sampler | {"engine": ALSO_CALLED.get(sampler["engine"], sampler["engine"])}
    return {
        "backend": type(backend).__name__,
        "config": plain,
        "model": backend.fingerprint,
        "schedule": backend.lr_schedule,
        "data": data,
        "data_processes": backend.data_size,
    }


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each change that makes numbers differ from those of a run that never stopped.

    Args:
        saved, now: the `identity` in the checkpoint, and the one of this run.

    Raises:
        ValueError: the checkpoint cannot be resumed with such a change.
    """
    before, after = ({key: value for key, value in flat(each).items() if value != {}} for each in (saved, now))
    found = []
    for key in sorted((before.keys() | after.keys()) - EXACT):
        if before.get(key) == after.get(key):
            continue
        change = f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        if key in REFUSED and key in before:
            raise ValueError(
                f"The checkpoint cannot be resumed, because {REFUSED[key]} ({change}). To start from its weights, "
                "write its path as model.model_path and leave train.resume_from_checkpoint out"
            )
        found.append(f"{change}: {_what_is_done(key)}")
    if not saved["config"]["train"]["save_optimizer"]:
        found.append("train.save_optimizer was false then: the optimizer's running averages start anew")
    elif not keeps_averages(saved, now):
        found.append("the optimizer's running averages start anew")
    return found


def can_change(setting: str) -> bool:
    """Whether a run that resumes takes another value of a setting, named as in ``method.gamma``, and learns by it."""
    key, kept = f"config.{setting}", {*EXACT, *REFUSED, "config.model.num_layers_unfrozen"}
    return key not in kept and any(f"{key}.".startswith(f"{name}.") for name in ADAPTED)


def keeps_averages(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the optimizer can continue with the checkpoint's running averages."""
    kinds = [
        (AVERAGES.get(optimizer["name"], optimizer["name"]), bool(optimizer["kwargs"].get("amsgrad")))
        for optimizer in (saved["config"]["optimizer"], now["config"]["optimizer"])
    ]
    return kinds[0] == kinds[1]


def _what_is_done(key: str) -> str:
    """The text of the setting `key`, or of the innermost section around it that has one."""
    parts = key.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((ADAPTED[name] for name in names if name in ADAPTED), "numbers will not be the interrupted run's")
