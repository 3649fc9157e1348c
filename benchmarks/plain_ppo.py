"""PPO written by hand in one file of plain PyTorch: the yardstick for what the library may cost.

It does the arithmetic the library does (the same sampling, scoring, advantages, clipped losses, optimizer and clipping)
on prompts of equal length, with nothing around it: no configuration, no checks, no logging, no other model or method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel


@dataclass
class Settings:
    """Names as in the library's PPO section."""

    max_new_tokens: int
    batch_size: int
    ppo_epochs: int
    lr: float
    eos: int
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_value: float = 0.2
    vf_coef: float = 1.0
    max_grad_norm: float = 1.0


class PlainPPO:
    """Policy, reference and optimizer; `collect` then `update` make one iteration."""

    def __init__(self, model: GPT2LMHeadModel, settings: Settings):
        self.settings, self.model = settings, model.eval()
        self.reference = copy.deepcopy(model).requires_grad_(False)
        width = model.config.n_embd
        self.value = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        nn.init.zeros_(self.value[2].weight)
        self.parameters = [*model.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, fused=True)

    @torch.no_grad()
    def generate(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, P + new] and the mask of sampled ones: up to and including eos."""
        tokens, step, cache = prompts, prompts, None
        alive, masks = torch.ones(len(prompts), dtype=torch.bool), []
        for _ in range(self.settings.max_new_tokens):
            out = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            drawn = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            step = torch.where(alive[:, None], drawn, self.settings.eos)
            tokens = torch.cat([tokens, step], dim=1)
            masks.append(alive)
            alive = alive & (step[:, 0] != self.settings.eos)
            if not alive.any():
                break
        return tokens, torch.stack(masks, dim=1)

    def logprobs(self, model: GPT2LMHeadModel, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens from `start` on, and the hidden states before them."""
        hidden = model.transformer(tokens, use_cache=False)[0][:, start - 1 : -1]
        logits = model.lm_head(hidden)
        chosen = -F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction="none")
        return chosen.view(tokens.shape[0], -1), hidden

    @torch.no_grad()
    def score(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and the reference's log-probabilities, in pieces of a batch."""
        columns = []
        for rows in tokens.split(self.settings.batch_size):
            logprobs, hidden = self.logprobs(self.model, rows, start)
            columns.append((logprobs, self.value(hidden)[..., 0], self.logprobs(self.reference, rows, start)[0]))
        old, values, ref = (torch.cat(parts) for parts in zip(*columns, strict=True))
        return old, values, ref

    def advantages(
        self, scores: Tensor, old: Tensor, values: Tensor, ref: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        rewards = -self.settings.kl_coef * (old - ref) * mask
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
        advantages, advantage, following = torch.zeros_like(rewards), 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + self.settings.gamma * following - values[:, t]
            advantage = (delta + self.settings.gamma * self.settings.lam * advantage) * mask[:, t]
            advantages[:, t], following = advantage, values[:, t] * mask[:, t]
        returns, chosen = advantages + values, advantages[mask]
        return (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt(), returns

    def update(
        self, tokens: Tensor, mask: Tensor, start: int, old: Tensor, values: Tensor, adv: Tensor, ret: Tensor
    ) -> None:
        """All passes over one collection."""
        c = self.settings
        for _ in range(c.ppo_epochs):
            for rows in torch.randperm(len(tokens)).split(c.batch_size):
                used = mask[rows]
                logprobs, hidden = self.logprobs(self.model, tokens[rows], start)
                new_values = self.value(hidden)[..., 0]
                ratio = (logprobs - old[rows]).exp()
                policy = torch.maximum(-adv[rows] * ratio, -adv[rows] * ratio.clamp(1 - c.clip, 1 + c.clip))
                near = values[rows] + (new_values - values[rows]).clamp(-c.clip_value, c.clip_value)
                value = torch.maximum((new_values - ret[rows]) ** 2, (near - ret[rows]) ** 2) / 2
                loss = ((policy + c.vf_coef * value) * used).sum() / used.sum()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def iteration(self, prompts: Tensor, reward: Callable[[Tensor, Tensor], Tensor], phase: Callable) -> None:
        """Samples, scores and updates once; `phase` is called with the name of each part as it begins."""
        phase("generate")
        tokens, mask = self.generate(prompts)
        phase("reward")
        scores = reward(tokens, mask)
        phase("score")
        start = prompts.shape[1]
        old, values, ref = self.score(tokens, start)
        advantages, returns = self.advantages(scores, old, values, ref, mask)
        phase("update")
        self.update(tokens, mask, start, old, values, advantages, returns)
        phase(None)
