"""GRPO and its relatives: advantages from groups of samples, and no value function."""

from __future__ import annotations

from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.prompts import Prompt
from trlx.method_configs import GRPOConfig
from trlx.methods.advantages import group_advantages, overlong_penalty, rewards_to_go, token_rewards
from trlx.methods.grpo import UNITS, grpo_loss
from trlx.methods.masked import Metrics, whiten
from trlx.methods.units import Unit
from trlx.rewards.results import total
from trlx.run.guards import check_first_ratio
from trlx.trainer.online import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """Policy gradients with the other samples of a prompt as baseline."""

    method_class = GRPOConfig

    @property
    def samples_per_prompt(self) -> int:
        return self.method.num_generations

    @property
    def passes_per_epoch(self) -> int:
        return self.method.num_iterations

    @property
    def unit(self) -> Unit:
        return UNITS[self.method.loss_type]

    @staticmethod
    def needs(method: GRPOConfig) -> ModelNeeds:
        # with dropout the policy that trains would differ from the policy that sampled
        return ModelNeeds(reference=method.kl_coef > 0, dropout=False)

    def sample(self, prompts: list[Prompt]) -> list[Rollout]:
        rollouts, size = super().sample(prompts), self.samples_per_prompt
        groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        for _ in range(self.method.max_resamplings):
            alike = [index for index, group in enumerate(groups) if _scores_are_equal(group)]
            if not alike:
                break
            fresh = super().sample(self.stream.take(len(alike)))
            for place, index in enumerate(alike):
                groups[index] = fresh[place * size : (place + 1) * size]
        for index, group in enumerate(groups):
            for rollout in group:
                rollout.group = index
        self.pending["rollouts/groups_alike"] = sum(map(_scores_are_equal, groups)) / len(groups)
        return [rollout for group in groups for rollout in group]

    def advantages(self, batch: TokenBatch) -> TokenBatch:
        """Subtracts the penalties from the scores, and compares each sample with its group."""
        mask, method = batch.response_mask, self.method
        rewards = batch.scores
        if method.kl_coef and method.kl_in == "reward":
            rewards = token_rewards(rewards, batch.old_logprobs, batch.ref_logprobs, mask, method.kl_coef)
        if method.advantage == "reinforce++":
            rewards = self._with_length_penalty(rewards, mask)
            return batch.replace(advantages=whiten(rewards_to_go(rewards, mask), mask))
        sums = self._with_length_penalty(rewards, mask).sum(dim=1)
        kind = "dr_grpo" if method.advantage == "reinforce++_baseline" else method.advantage
        advantages = group_advantages(sums, batch.group, kind)[:, None] * mask
        if method.advantage == "reinforce++_baseline":
            advantages = whiten(advantages, mask)
        return batch.replace(advantages=advantages)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        return grpo_loss(
            outputs,
            batch,
            method.loss_type,
            method.cliprange,
            method.cliprange_high or method.cliprange,
            self.rollout_sampling.max_new_tokens,
            method.kl_coef if method.kl_in == "loss" else 0.0,
        )

    def after_step(self, metrics: dict[str, float]) -> None:
        if self.schedule.step == 1:
            check_first_ratio(metrics["policy/ratio_deviation/max"])

    def _with_length_penalty(self, rewards: Tensor, mask: Tensor) -> Tensor:
        method = self.method
        if not method.overlong_buffer:
            return rewards
        longest = self.rollout_sampling.max_new_tokens
        penalty = method.overlong_penalty * overlong_penalty(mask.sum(dim=1), longest, method.overlong_buffer)
        is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        return rewards + penalty[:, None] * is_last


def _scores_are_equal(group: list[Rollout]) -> bool:
    return len({total(rollout.score) for rollout in group}) == 1
