"""Methods that CarperAI's trlx called on classes of users and that nothing calls here, each with today's place for it.

A class that overrides one would train something else than it says, so it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_CONFIG = "the sections optimizer and scheduler of the config say it"
_SAMPLING = "override sampling(gen_kwargs), which rollouts and evaluations ask for their settings"
_TRAINER_SAYS = "a trainer says it: override loss(scores, batch) or collect() there"

HOOKS: dict[str, dict[str, str]] = {
    "trainer": {
        "loss": "it is called as loss(scores, batch), with a trlx.batch.TokenScores and a trlx.batch.TokenBatch",
        "make_experience": "override collect(), which returns what the coming epoch trains on",
        "make_experience_seq2seq": "make_experience(samples, rewards, seq_length) takes every kind of model",
        "push_to_store": "override collect(), which returns what the coming epoch trains on",
        "prepare_learning": "override collect() and inner_epochs, which say what is trained on and how often",
        "create_train_dataloader": "override collect(), whose rows are put into batches of train.batch_size",
        "post_backward_callback": "override after_step(metrics), called after every optimizer step",
        "post_epoch_callback": "override collect(), called at the beginning of every epoch",
        "get_arch": "override needs(), which says what heads and reference the model gets",
        "setup_model": "override needs(), which says what heads and reference the model gets",
        "setup_optimizer": _CONFIG,
        "setup_scheduler": _CONFIG,
        "setup_rollout_logging": "train.rollout_logging_dir says where rollouts are written",
        "get_model_inputs": "override collect(): its rows are what the model sees",
        "decode": "change texts in reward_fn, or cut them with stop_sequences",
        "generate": _SAMPLING,
        "generate_eval": _SAMPLING,
    },
    "method": {
        "loss": _TRAINER_SAYS,
        "get_advantages_and_returns": _TRAINER_SAYS,
        "heads": "a trainer says it: override needs() there",
        "from_dict": "fields and check() say what a config may hold",
    },
    "pipeline": {"create_loader": "prompts are read one by one, as pipeline[i], and padded where they are sampled"},
}
"""By kind of class: method -> what to write instead."""

_BASES = ("trlx.trainer.base", "trlx.compat.attributes", "trlx.data.prompts")
"""Where functions of these names are meant for callers."""

REQUIRED = {"pipeline": ("__len__", "__getitem__", "digest")}
"""What a class must have that does not inherit from one of ours."""


def check_hooks(kind: str, cls: type) -> None:
    """Refuses a trainer, method or pipeline of a user that expects to be called where nothing calls it.

    Raises:
        TypeError: `cls` overrides a hook of CarperAI's trlx, or lacks a method that is called.
    """
    dead = [name for name in HOOKS.get(kind, ()) if _is_the_users(cls, name) and not _is_called(kind, cls, name)]
    if dead:
        advice = "; ".join(f"for {name}: {HOOKS[kind][name]}" for name in dead)
        raise TypeError(f"{cls.__name__} overrides what nothing here calls ({advice}), see docs/own-method.md")
    missing = [name for name in REQUIRED.get(kind, ()) if not hasattr(cls, name)]
    if missing:
        raise TypeError(
            f"{cls.__name__} needs {' and '.join(missing)} to be a {kind}: subclass trlx.data.prompts.PromptPipeline, "
            "see docs/own-method.md"
        )


def _is_the_users(cls: type, name: str) -> bool:
    """Whether `name` is a function that the base class does not have; one put there later counts, a field does not."""
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
