"""What scripts written for CarperAI's trlx ask of a trainer: a few names work, the others say what took their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trlx.compat.hooks import HOOKS
from trlx.rollout.sampling import sweep_variants
from trlx.trainer.sequences import sample_sequences

_LOADER = "trainer.store holds the rows, and trlx.data.store.pass_order says in which order they are read"
_EVALUATOR = "trainer.evaluator holds the prompts of evaluations"
_STREAM = "trainer.stream draws PPO's prompts, and RFT's are trainer.pipeline"
_MINIBATCH = "trainer.backend.microbatch_size says how batches are split"
_LOG = "trainer.config.train.rollout_logging_dir says where rollouts are written"
_METHOD = "trainer.config.method holds the settings of the method"
_SCHEDULE = "trainer.config.train says how often it evaluates and how long it trains"

ATTRIBUTES: dict[str, str] = {
    "accelerator": "trainer.backend speaks for devices and processes; Accelerate's own object is "
    "trainer.backend.accelerator",
    "opt": "Accelerate's optimizer is trainer.backend.sharding.optimizer",
    "scheduler": "trainer.backend.scheduler",
    "ref_model": "trainer.backend.score(batch, reference=True) asks the reference policy",
    "kl_ctl": "trainer.kl, whose coefficient is trainer.kl.coef",
    "mean_kl": "it is logged as policy/kl",
    "approx_kl": "it is logged as policy/kl",
    "running_moments": "trainer.moments",
    "ref_mean": "the mean of scores is never subtracted",
    "train_dataloader": _LOADER,
    "eval_dataloader": _EVALUATOR,
    "eval_pipeline": _EVALUATOR,
    "prompt_iterator": _STREAM,
    "prompt_dataloader": _STREAM,
    "prompt_pipeline": _STREAM,
    "generate_kwargs": "trainer.config.method.gen_kwargs",
    "generate_experience_kwargs": "trainer.sampling_kwargs",
    "generate_sweep_kwarg": "trainer.eval_variants holds the settings of each evaluation",
    "max_length": "trainer.config.train.seq_length",
    "logit_mask": "ILQL trainers take one, as logit_mask in trainer.config.train.trainer_kwargs",
    "stop_sequences": "trainer.stopper ends and cuts responses",
    "mb_size": _MINIBATCH,
    "num_mb": _MINIBATCH,
    "mb_count": _MINIBATCH,
    "n_inner_epochs": "trainer.inner_epochs",
    "n_updates_per_batch": "trainer.inner_epochs",
    "epoch_count": "trainer.state.epoch",
    "nth_evaluation": "trainer.state.step says when it is",
    "train_mode": "trainer.learn() trains, and nothing else does",
    "log_rollouts": _LOG,
    "rollout_logging_dir": _LOG,
    "run_id": _LOG,
    "ilql": _METHOD,
    "ppo_config": _METHOD,
    "ilql_config": _METHOD,
    "sft_config": _METHOD,
    "generations_per_prompt": _METHOD,
    "megatron_cfg": "trainer.config.train.trainer_kwargs has the layout and the model",
    "limit_val_batches": _SCHEDULE,
    "val_check_interval": _SCHEDULE,
    "train_samples": _SCHEDULE,
}
"""What was an attribute of trainers, and what to read instead."""


class OldNames:
    """Attributes of the original's trainers. Reading one that is gone names its successor, and so does setting it:
    nothing would look at the value."""

    def generate_eval(self, input_ids: Any, attention_mask: Any = None, **gen_kwargs: Any) -> Tensor:
        """`Trainer.generate` with the settings of evaluations; of a sweep, those of its first value."""
        settings = sweep_variants(self.config.method.gen_kwargs)[0][1]
        sampling = self.sampling({**settings, **gen_kwargs})
        return sample_sequences(self.backend, self.tokenizer, sampling, input_ids, attention_mask)

    def __getattr__(self, name: str) -> Any:
        if name in _WORKING:
            return _WORKING[name](self)
        if name in ATTRIBUTES:
            raise AttributeError(f"trainer.{name} of CarperAI's trlx is gone: {ATTRIBUTES[name]}")
        return object.__getattribute__(self, name)  # fails, in Python's own words

    def __setattr__(self, name: str, value: Any) -> None:
        instead = ATTRIBUTES.get(name) or HOOKS["trainer"].get(name) or (name in _WORKING and "it can only be read")
        if instead and not hasattr(type(self), name):
            raise AttributeError(f"Setting trainer.{name} has no effect: {instead}; choose another name for your own")
        super().__setattr__(name, value)


def _model(trainer: Any) -> Any:
    policy = getattr(trainer.backend, "policy", None)
    if policy is None:
        raise AttributeError(
            "trainer.model is there with Accelerate only: on Megatron each process holds a part of the model, so use "
            "trainer.generate() and trainer.save_pretrained()"
        )
    if policy.q_heads is not None:
        raise AttributeError(
            "trainer.model would sample without the Q heads of ILQL: use trainer.generate() and "
            "trainer.save_pretrained(), or trainer.backend.policy.model for the language model alone"
        )
    return policy.model


_WORKING: dict[str, Callable[[Any], Any]] = {"model": _model, "iter_count": lambda trainer: trainer.state.step}
