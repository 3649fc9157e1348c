"""PPO: the advantages that a value function gives, then several passes of clipped updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.batch import TokenBatch, TokenOutputs
from trlx.method_configs import PPOConfig
from trlx.methods.advantages import AdaptiveKL, FixedKL, gae, token_rewards
from trlx.methods.masked import Metrics, whiten
from trlx.methods.ppo import ppo_loss
from trlx.run.guards import check_first_ratio
from trlx.trainer.online import OnlineTrainer


class PPOTrainer(OnlineTrainer):
    """Proximal policy optimization with a KL penalty to the first policy."""

    method_class = PPOConfig
    method: PPOConfig

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        super().__init__(config, reward_fn, metric_fn, stop_sequences)
        method = self.method
        self.kl = FixedKL(method.init_kl_coef)
        if method.target is not None:
            self.kl = AdaptiveKL(method.init_kl_coef, method.target, method.horizon)

    @property
    def passes_per_epoch(self) -> int:
        return self.config.method.ppo_epochs

    @staticmethod
    def needs(method: PPOConfig) -> ModelNeeds:
        # with dropout the policy that trains would differ from the policy that sampled
        return ModelNeeds(value_head=True, value_layers=method.num_value_layers_unfrozen, reference=True, dropout=False)

    def advantages(self, batch: TokenBatch) -> TokenBatch:
        """Subtracts the KL penalty from the scores, estimates advantages with GAE, and whitens them."""
        mask, method, coefficient = batch.response_mask, self.method, self.kl.coef
        rewards = token_rewards(
            batch.scores, batch.old_logprobs, batch.ref_logprobs, mask, coefficient, estimator=method.kl_estimator
        )
        advantages, returns = gae(rewards, batch.old_values, mask, method.gamma, method.lam)
        self.pending["kl_ctl_value"] = coefficient
        self.kl.update(self.pending["policy/kl"], len(batch))
        return batch.replace(advantages=whiten(advantages, mask), returns=returns)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        return ppo_loss(outputs, batch, method.cliprange, method.cliprange_value, method.vf_coef, method.dual_clip)

    def after_step(self, metrics: dict[str, float]) -> None:
        if self.schedule.step == 1:
            check_first_ratio(metrics["policy/ratio_deviation/max"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kl": self.kl.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kl.load_state_dict(state["kl"])
