"""Attributes of CarperAI's trainers: a few still work, the others raise an error that names the successor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trlx.compat.hooks import HOOKS
from trlx.sampling.settings import sweep_variants
from trlx.sampling.texts import Respond

_GONE = {
    "accelerator": "trainer.backend has device and data_rank; Accelerate's object is trainer.backend.accelerator",
    "opt": "Accelerate's optimizer is trainer.backend.sharding.optimizer",
    "scheduler": "trainer.backend.scheduler",
    "ref_model": "trainer.backend.evaluate(batch, reference=True) runs the reference policy",
    "kl_ctl": "trainer.kl, whose coefficient is trainer.kl.coef",
    "mean_kl approx_kl": "it is logged as policy/kl",
    "running_moments": "trainer.scale.moments",
    "ref_mean": "the mean of scores is never subtracted",
    "train_dataloader": "trainer.store holds the rows, and trlx.data.store.pass_order gives their order",
    "eval_dataloader eval_pipeline": "trainer.evaluator holds the prompts of evaluations",
    "prompt_iterator prompt_dataloader prompt_pipeline": "PPO draws from trainer.stream, RFT from trainer.pipeline",
    "generate_kwargs": "trainer.config.method.gen_kwargs",
    "generate_experience_kwargs": "trainer.sampling_kwargs",
    "generate_sweep_kwarg": "trainer.eval_variants holds the settings of each evaluation",
    "max_length": "trainer.config.train.seq_length",
    "logit_mask": "ILQL trainers take it as logit_mask in trainer.config.train.trainer_kwargs",
    "stop_sequences": "trainer.stopper holds them",
    "mb_size num_mb mb_count": "trainer.backend.microbatch_size is the number of rows computed at once",
    "n_inner_epochs n_updates_per_batch": "trainer.passes_per_epoch",
    "epoch_count": "trainer.schedule.epoch",
    "nth_evaluation": "trainer.schedule.step is the step of the evaluation",
    "train_mode": "models train in trainer.learn() only",
    "log_rollouts rollout_logging_dir run_id": "trainer.config.train.rollout_logging_dir is the folder of rollouts",
    "ilql ppo_config ilql_config sft_config generations_per_prompt": "trainer.config.method holds the settings",
    "megatron_cfg": "trainer.config.train.trainer_kwargs holds it",
    "limit_val_batches val_check_interval train_samples": "trainer.config.train has eval_interval and total_steps",
}
ATTRIBUTES: dict[str, str] = {name: instead for names, instead in _GONE.items() for name in names.split()}
"""Gone attribute -> what to read instead."""


class OldNames:
    """Attributes of the original's trainers. To read one that is gone is an error that names its successor; to set one
    is an error too, because nothing would read the value."""

    def generate_eval(self, input_ids: Any, attention_mask: Any = None, **gen_kwargs: Any) -> Tensor:
        """`Trainer.generate` with the settings of evaluations; of a sweep, those of its first value."""
        settings = sweep_variants(self.config.method.gen_kwargs)[0][1]
        sampling = self.sampling({**settings, **gen_kwargs})
        respond = Respond(self.draw, self.tokenizer, self.backend.row_format, sampling)
        return respond.sequences(input_ids, attention_mask)

    def __getattr__(self, name: str) -> Any:
        if name in _WORKING:
            return _WORKING[name](self)
        if name in ATTRIBUTES:
            raise AttributeError(f"trainer.{name} of CarperAI's trlx is gone: {ATTRIBUTES[name]}")
        return object.__getattribute__(self, name)  # raises Python's own AttributeError

    def __setattr__(self, name: str, value: Any) -> None:
        instead = ATTRIBUTES.get(name) or HOOKS["trainer"].get(name) or (name in _WORKING and "it can only be read")
        if instead and not hasattr(type(self), name):
            raise AttributeError(
                f"Setting trainer.{name} has no effect: {instead}; choose another name for your own value"
            )
        super().__setattr__(name, value)


def _model(trainer: Any) -> Any:
    policy = getattr(trainer.backend, "policy", None)
    if policy is None:
        raise AttributeError(
            "trainer.model exists with Accelerate only: on Megatron each process holds a part of the model, so use "
            "trainer.generate() and trainer.save_pretrained()"
        )
    if policy.q_heads is not None:
        raise AttributeError(
            "trainer.model.generate() would sample without the Q heads of ILQL: use trainer.generate() and "
            "trainer.save_pretrained(), or trainer.backend.policy.model for the language model alone"
        )
    return policy.model


_WORKING: dict[str, Callable[[Any], Any]] = {"model": _model, "iter_count": lambda trainer: trainer.schedule.step}
