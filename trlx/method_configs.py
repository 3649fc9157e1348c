"""The settings of each algorithm: the ``method`` section of a config, one dataclass per method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trlx.registry import methods, register_method
from trlx.strict import ConfigError, Section


@dataclass
class MethodConfig(Section, section="method"):
    """Base of the method sections. Own methods subclass it and register with ``@trlx.register_method``."""

    name: str = "MethodConfig"
    """Registered name of the section's class; chooses the class when a config is read from YAML."""


def get_method(name: str) -> type:
    """The method section registered under a name, in any case.

    Raises:
        ValueError: the name is unknown.
        TypeError: the class names settings, but is no dataclass, which would ignore them.
    """
    cls = methods.get(name)
    if vars(cls).get("__annotations__") and "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__name__} has settings but is no dataclass: write @dataclass above @register_method")
    return cls


def _sampling(**changes: Any) -> Any:
    """A fresh dict of generation settings per config."""
    return field(default_factory=lambda: dict(changes))


@dataclass
class OnlineConfig(MethodConfig):
    """Base of the methods that train on their own samples."""

    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings; evaluations run once for each value of an entry that is a list."""
    gen_experience_kwargs: dict[str, Any] | None = None
    """Generation settings of rollouts; null: those of gen_kwargs."""

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
    """Base of the methods that collect rollouts, train on them, and collect again."""

    num_rollouts: int = 128
    """Rollouts per collection, over all processes."""
    chunk_size: int = 128
    """Rollouts generated at once per process; the next chunk is generated while this one is scored."""
    scale_reward: str | bool | None = None
    """"running" divides scores by their running std, "ref" by the std of the first collection; null, false or
    "ignored" does not divide."""
    ref_mean: float | None = None
    """Accepted for old configs; no mean is subtracted."""
    ref_std: float | None = None
    """Std for scale_reward "ref"; null: the first collection's."""
    cliprange_reward: float | None = 10.0
    """Scores are clipped to plus or minus this before scaling; 0 or null: off."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that does not end by itself; null: off."""
    importance_cap: float | None = None
    """Each token's advantage is multiplied by π(token) / sampler's probability of it, at most this; null: off. For
    samplers with a copy of the weights ([why](sampling.md#mismatch))."""

    def check(self) -> None:
        self.require_range(1, "num_rollouts", "chunk_size")
        self.require_positive("ref_std", "importance_cap")
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
    """KL per sequence (nats) that an adaptive coefficient aims at; null: the coefficient is fixed."""
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
    """The value function gets its own trainable copy of this many top blocks; 0: a head on the policy's last hidden
    state."""
    dual_clip: float | None = None
    """Lower bound c > 1 of the objective where the advantage is negative (arXiv:1912.09729); null: off."""

    def check(self) -> None:
        super().check()
        self.require_range(1, "ppo_epochs", "horizon")
        self.require_range(0, "gamma", "lam", high=1)
        self.require_range(0, "init_kl_coef", "vf_coef", "num_value_layers_unfrozen")
        self.require_positive("cliprange", "cliprange_value", "target")
        self.require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", "be more than 1")
        self.require_choice("kl_estimator", ["k1", "k2", "k3"])


ILQL_SAMPLING = {"top_k": 20, "beta": 1}
"""Defaults of settings that ILQL's gen_kwargs do not name."""


@dataclass
@register_method
class GRPOConfig(CollectionConfig):
    """Group relative policy optimization (arXiv:2402.03300); `advantage` and `loss_type` choose its relatives."""

    name: str = "GRPOConfig"
    num_generations: int = 8
    """Samples of each prompt, which are compared with each other."""
    num_iterations: int = 1
    """Passes over one collection of rollouts."""
    advantage: str = "grpo"
    """grpo (mean and std of the group), dr_grpo (mean of the group), rloo (mean of the other samples), reinforce++
    (rewards to go, whitened over the collection), reinforce++_baseline (mean of the group, then whitened)."""
    loss_type: str = "grpo"
    """grpo (mean of each sequence), dr_grpo (sum by max_new_tokens), dapo (mean of all tokens), gspo (ratio of the
    sequence)."""
    cliprange: float = 0.2
    """Clip range of the probability ratio below 1, and above it if cliprange_high is null."""
    cliprange_high: float | None = None
    """Clip range of the probability ratio above 1 (arXiv:2503.14476); null: cliprange."""
    kl_coef: float = 0.04
    """Coefficient of the KL to the first policy; 0: no KL, and no reference policy is kept."""
    kl_in: str = "loss"
    """loss (estimator k3) or reward (estimator k1)."""
    overlong_buffer: int = 0
    """Over this many tokens before max_new_tokens the penalty rises from 0 to overlong_penalty; 0: no penalty."""
    overlong_penalty: float = 1.0
    """Subtracted from the score of a response of max_new_tokens tokens."""
    max_resamplings: int = 0
    """How often groups whose scores are all equal are replaced by samples of other prompts (arXiv:2503.14476)."""

    def check(self) -> None:
        super().check()
        for name, least in (("num_iterations", 1), ("overlong_buffer", 0), ("max_resamplings", 0), ("kl_coef", 0)):
            self.require(getattr(self, name) >= least, name, f"be {least} or more")
        self.require_choice("advantage", ["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"])
        self.require_choice("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
        self.require_choice("kl_in", ["loss", "reward"])
        least = 1 if self.advantage == "reinforce++" else 2
        self.require(self.num_generations >= least, "num_generations", f"be at least {least} with this advantage")
        rule = "be 0 with method.num_generations 1, because the scores of every group are then equal"
        self.require(self.num_generations > 1 or not self.max_resamplings, "max_resamplings", rule)
        self.require(self.num_rollouts >= self.num_generations, "num_rollouts", "be at least method.num_generations")
        self.require(self.cliprange > 0, "cliprange", "be positive")
        high = self.cliprange_high
        self.require(high is None or high > 0, "cliprange_high", "be positive, or null for method.cliprange")
        longest = self.sampling.get("max_new_tokens") or 0
        self.require(self.overlong_buffer <= longest, "overlong_buffer", f"be at most max_new_tokens ({longest})")


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
    """Step of the target Q heads towards the Q heads (Polyak averaging); 1 copies them."""
    beta: float = 0.0
    """Temperature of the advantage weight exp(beta (Q - V)) in the AWAC loss."""
    steps_for_target_q_sync: int = 5
    """Optimizer steps between two target updates."""
    two_qs: bool = True
    """Two Q heads and their minimum as target, or one."""
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=56, **ILQL_SAMPLING, temperature=1.0)
    """Generation settings; ``beta`` adds beta (Q - V) to the policy's log-probabilities. Evaluations run once for each
    value of an entry that is a list."""

    def check(self) -> None:
        self.require_range(0, "tau", "gamma", "alpha", high=1)
        self.require_range(1, "steps_for_target_q_sync")


@dataclass
@register_method
class SFTConfig(MethodConfig):
    """Supervised fine-tuning."""

    name: str = "SFTConfig"
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings; evaluations run once for each value of an entry that is a list."""


@dataclass
@register_method
class DPOConfig(MethodConfig):
    """Direct preference optimization (arXiv:2305.18290): pairs of answers, without a reward model."""

    name: str = "DPOConfig"
    loss_type: str = "sigmoid"
    """sigmoid (arXiv:2305.18290), hinge (arXiv:2305.10425) or ipo (arXiv:2310.12036)."""
    beta: float = 0.1
    """Multiplies log-ratios of policy and reference; the larger, the closer the policy stays to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs whose label is taken to be wrong (loss_type sigmoid)."""
    sft_coef: float = 0.0
    """Weight of the cross-entropy of the chosen answer, a mean over its tokens."""
    length_normalized: bool = False
    """Divides the log-probabilities of an answer by the number of its tokens."""
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings; evaluations run once for each value of an entry that is a list."""

    def check(self) -> None:
        self.require_choice("loss_type", ["sigmoid", "hinge", "ipo"])
        self.require_positive("beta")
        self.require_range(0, "sft_coef")
        self.require(0 <= self.label_smoothing < 0.5, "label_smoothing", "be at least 0 and less than 0.5")
        smooth = self.label_smoothing == 0 or self.loss_type == "sigmoid"
        self.require(smooth, "label_smoothing", "be 0 unless method.loss_type is sigmoid")


@dataclass
@register_method
class RewardConfig(MethodConfig):
    """A reward model that learns which of two answers is better (Bradley-Terry, arXiv:2203.02155)."""

    name: str = "RewardConfig"
    center_coef: float = 0.0
    """Weight of (r_chosen + r_rejected)^2 in the loss, which keeps rewards around 0 (arXiv:2312.09244); 0: off."""
    gen_kwargs: ClassVar[dict[str, Any]] = {"max_new_tokens": 1}  # it generates nothing

    def check(self) -> None:
        self.require_range(0, "center_coef")


@dataclass
@register_method
class KTOConfig(MethodConfig):
    """Kahneman-Tversky optimization (arXiv:2402.01306): answers with a label, without pairs or a reward model."""

    name: str = "KTOConfig"
    beta: float = 0.1
    """Multiplies log-ratios of policy and reference; the larger, the closer the policy stays to the reference."""
    desirable_weight: float = 1.0
    """Weight of the loss of answers with the label True."""
    undesirable_weight: float = 1.0
    """Weight of the loss of answers with the label False."""
    gen_kwargs: dict[str, Any] = _sampling(max_new_tokens=40, top_k=0, top_p=1.0, do_sample=True)
    """Generation settings; evaluations run once for each value of an entry that is a list."""

    def check(self) -> None:
        self.require_positive("beta")
        self.require_range(0, "desirable_weight", "undesirable_weight")


@dataclass
@register_method
class RFTConfig(OnlineConfig):
    """Rejection fine-tuning: the policy learns from its own best samples, with a rising threshold."""

    name: str = "RFTConfig"
    start_percentile: float = 0.7
    """Quantile of a prompt's scores that a sample must reach in the first improvement step."""
    end_percentile: float = 0.95
    """The quantile rises towards this in n_improve_steps equal steps; the last step uses the value one step below."""
    n_improve_steps: int = 4
    """Improvement steps after each sampling of the prompts."""
    n_generations_per_prompt: int = 32
    """Samples per prompt at each sampling."""

    def check(self) -> None:
        self.require_range(0, "start_percentile", "end_percentile", high=1)
        self.require_range(1, "n_improve_steps", "n_generations_per_prompt")
        if self.end_percentile < self.start_percentile:
            raise ConfigError("method.end_percentile must not be below method.start_percentile")
