"""The settings of each algorithm: the ``method`` section of a config, one dataclass per method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trlx.registry import methods, register_method
from trlx.strict import ConfigError, Section


@dataclass
class MethodConfig(Section):
    """Base of the method sections. Own methods subclass it and register with ``@trlx.register_method``."""

    section: ClassVar[str] = "method"

    name: str = "MethodConfig"
    """Registered name of the section's class; chooses the class when a config is read from YAML."""


def get_method(name: str) -> type[MethodConfig]:
    """The method section registered as `name`, in any case."""
    return methods.get(name)


def _sampling(**changes: Any) -> Any:
    """A fresh dict of generation settings per config."""
    return field(default_factory=lambda: dict(changes))


@dataclass
class OnlineConfig(MethodConfig):
    """Base of the methods that train on their own samples."""

    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings; one list-valued entry is swept at evaluation."""
    gen_experience_kwargs: dict[str, Any] | None = None
    """Generation settings of rollouts, where they differ from evaluation's."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Generation settings of rollouts."""
        return self.gen_experience_kwargs or self.gen_kwargs

    @property
    def sampling_key(self) -> str:
        """Where the generation settings of rollouts are written."""
        return "method.gen_experience_kwargs" if self.gen_experience_kwargs else "method.gen_kwargs"


@dataclass
class CollectionConfig(OnlineConfig):
    """Base of the methods that train on one collection of rollouts after the other."""

    num_rollouts: int = 128
    """Rollouts per collection, over all processes."""
    chunk_size: int = 128
    """Rollouts generated at once per process; while one chunk is scored the next is generated."""
    scale_reward: str | bool | None = None
    """What scores are divided by: "running" their running std, "ref" the std of the first collection; null, false or
    "ignored": nothing."""
    ref_mean: float | None = None
    """Accepted for old configs; the mean is never subtracted."""
    ref_std: float | None = None
    """Std for scale_reward "ref"; null takes the first collection's."""
    cliprange_reward: float | None = 10.0
    """Scores are clipped to plus or minus this before scaling; 0 or null: off."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that does not end."""

    def check(self) -> None:
        for name in ("num_rollouts", "chunk_size"):
            self.require(getattr(self, name) >= 1, name, "be at least 1")
        self.require(self.ref_std is None or self.ref_std > 0, "ref_std", "be positive")
        self.require_choice("scale_reward", ["running", "ref", "ignored", None, False])


@dataclass
@register_method
class PPOConfig(CollectionConfig):
    """Proximal policy optimization (arXiv:1707.06347) with a KL penalty to the first policy (arXiv:1909.08593)."""

    name: str = "PPOConfig"
    ppo_epochs: int = 4
    """Passes over one collection of rollouts."""
    init_kl_coef: float = 0.001
    """First coefficient of the KL penalty in the reward."""
    target: float | None = None
    """KL per sequence (nats) that the coefficient is steered to; null keeps the coefficient fixed."""
    horizon: int = 10000
    """Rollouts over which an adaptive coefficient reacts."""
    kl_estimator: str = "k1"
    """Estimator of the KL penalty per token: k1, k2 or k3 (http://joschu.net/blog/kl-approx.html)."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE lambda."""
    cliprange: float = 0.2
    """Clip range of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip range of the value around its value at collection."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    num_value_layers_unfrozen: int = 0
    """Top blocks the value function gets as its own trainable copy; 0: a head on the policy's last hidden state."""
    dual_clip: float | None = None
    """Lower bound c > 1 of the objective where the advantage is negative (arXiv:1912.09729); null: off."""

    def check(self) -> None:
        super().check()
        for name in ("ppo_epochs", "horizon"):
            self.require(getattr(self, name) >= 1, name, "be at least 1")
        for name in ("gamma", "lam"):
            self.require(0 <= getattr(self, name) <= 1, name, "be between 0 and 1")
        for name in ("cliprange", "cliprange_value"):
            self.require(getattr(self, name) > 0, name, "be positive")
        for name in ("init_kl_coef", "vf_coef"):
            self.require(getattr(self, name) >= 0, name, "be 0 or more")
        self.require(self.num_value_layers_unfrozen >= 0, "num_value_layers_unfrozen", "be 0 or more")
        self.require(self.target is None or self.target > 0, "target", "be positive, or null for a fixed coefficient")
        self.require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "be more than 1")
        self.require_choice("kl_estimator", ["k1", "k2", "k3"])


@dataclass
@register_method
class ILQLConfig(MethodConfig):
    """Implicit language Q-learning (arXiv:2206.11871)."""

    name: str = "ILQLConfig"
    tau: float = 0.7
    """Expectile of the value loss."""
    gamma: float = 0.99
    """Discount per token."""
    cql_scale: float = 0.1
    """Weight of the conservative loss on Q."""
    awac_scale: float = 1.0
    """Weight of the advantage-weighted cross-entropy."""
    alpha: float = 0.001
    """Polyak step of the target Q heads; 1 copies them."""
    beta: float = 0.0
    """Temperature of the advantage weight exp(beta (Q - V)) in the AWAC loss."""
    steps_for_target_q_sync: int = 5
    """Optimizer steps between two target updates."""
    two_qs: bool = True
    """Two Q heads and their minimum as target, or one."""
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=56, top_k=20, beta=1, temperature=1.0)
    """Generation settings; ``beta`` shifts the policy's log-probabilities by beta (Q - V). One list is swept."""

    def check(self) -> None:
        for name in ("tau", "gamma", "alpha"):
            self.require(0 <= getattr(self, name) <= 1, name, "be between 0 and 1")
        self.require(self.steps_for_target_q_sync >= 1, "steps_for_target_q_sync", "be at least 1")


@dataclass
@register_method
class SFTConfig(MethodConfig):
    """Supervised fine-tuning."""

    name: str = "SFTConfig"
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings of evaluations; one list-valued entry is swept."""


@dataclass
@register_method
class RFTConfig(OnlineConfig):
    """Rejection fine-tuning: train on one's own best samples, with a rising threshold."""

    name: str = "RFTConfig"
    start_percentile: float = 0.7
    """Quantile of a prompt's scores that a sample must reach in the first improvement step."""
    end_percentile: float = 0.95
    """What that quantile rises towards; the last step stays one of n_improve_steps parts below it."""
    n_improve_steps: int = 4
    """Improvement steps on one growth of samples."""
    n_generations_per_prompt: int = 32
    """Samples drawn per prompt at each growth."""

    def check(self) -> None:
        for name in ("start_percentile", "end_percentile"):
            self.require(0 <= getattr(self, name) <= 1, name, "be between 0 and 1")
        for name in ("n_improve_steps", "n_generations_per_prompt"):
            self.require(getattr(self, name) >= 1, name, "be at least 1")
        if self.end_percentile < self.start_percentile:
            raise ConfigError("method.end_percentile must not be below method.start_percentile")
