"""Methods of users' classes that CarperAI's trlx called and trlx does not call, each with what to write instead.

A class that overrides one is refused, because the override would have no effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_INSTEAD = {
    "trainer": {
        "loss": "define loss(outputs, batch), which gets a trlx.batch.TokenOutputs and a trlx.batch.TokenBatch",
        "make_experience push_to_store": "override collect(), which returns what the coming epoch trains on",
        "make_experience_seq2seq": "make_experience(samples, rewards, seq_length) takes every kind of model",
        "prepare_learning": "override collect() for the data of an epoch, and passes_per_epoch for the passes over it",
        "create_train_dataloader": "override collect(), whose rows trlx puts into batches of train.batch_size",
        "post_backward_callback": "override after_step(metrics), called after every optimizer step",
        "post_epoch_callback": "override collect(), called at the beginning of every epoch",
        "get_arch setup_model": "override needs(method), which returns the heads and the reference that the model gets",
        "setup_optimizer setup_scheduler": "set it in the sections optimizer and scheduler of the config",
        "setup_rollout_logging": "set train.rollout_logging_dir, the folder for rollouts",
        "get_model_inputs": "override collect(), whose rows are the inputs of the model",
        "decode": "change texts in reward_fn, or cut them with stop_sequences",
        "generate generate_eval": "override sampling(gen_kwargs), which makes the settings of rollouts and evaluations",
    },
    "method": {
        "loss get_advantages_and_returns": "override loss(outputs, batch) or advantages(batch) of a trainer",
        "heads": "override needs(method) of a trainer",
        "from_dict": "declare fields, and refuse wrong values in check()",
    },
    "pipeline": {"create_loader": "trlx reads prompts as pipeline[i] and pads them when it samples"},
}
HOOKS: dict[str, dict[str, str]] = {
    kind: {name: instead for names, instead in rows.items() for name in names.split()}
    for kind, rows in _INSTEAD.items()
}
"""By kind of class: method -> what to write instead."""

_BASES = ("trlx.trainer.base", "trlx.compat.attributes", "trlx.data.prompts")
"""Modules of ours with methods of these names, for users to call."""

REQUIRED = {"pipeline": ("__len__", "__getitem__", "digest")}
"""Methods that a class needs where it does not inherit from ours."""


def check_hooks(kind: str, cls: type) -> None:
    """Refuses a user's trainer, method or pipeline with an override that would have no effect.

    Raises:
        TypeError: `cls` overrides a method that trlx does not call, or lacks one that it calls.
    """
    dead = [name for name in HOOKS.get(kind, ()) if _is_the_users(cls, name) and not _is_called(kind, cls, name)]
    if dead:
        advice = "; ".join(f"instead of {name}: {HOOKS[kind][name]}" for name in dead)
        raise TypeError(f"{cls.__name__} overrides methods that trlx does not call: {advice}. See docs/extending.md")
    missing = [name for name in REQUIRED.get(kind, ()) if not hasattr(cls, name)]
    if missing:
        raise TypeError(
            f"{cls.__name__} needs {' and '.join(missing)} to be a {kind}: subclass trlx.data.prompts.PromptPipeline, "
            "see docs/extending.md"
        )


def _is_the_users(cls: type, name: str) -> bool:
    """Whether `name` is a function from outside of `_BASES`, also one set on our classes; a dataclass field is none."""
    function = _function(inspect.getattr_static(cls, name, None))
    return function is not None and function.__module__ not in _BASES


def _function(member: Any) -> Callable[..., Any] | None:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return member if inspect.isroutine(member) else None


def _is_called(kind: str, cls: type, name: str) -> bool:
    if (kind, name) == ("trainer", "make_experience"):
        return getattr(cls, "online", None) is False
    return (kind, name) == ("trainer", "loss") and _takes_scores_and_batch(cls.loss)


def _takes_scores_and_batch(loss: Callable[..., Any]) -> bool:
    try:
        inspect.signature(loss).bind("self", "scores", "batch")
    except TypeError:
        return False
    return True
