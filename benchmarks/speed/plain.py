"""PPO and SFT written by hand in plain PyTorch, as careful people write it for one script: what a library may cost.

They do the arithmetic that the library does, with nothing around it: no configuration, no checks, no logging. Given the
same samples, PPO makes the same weights, see tests/unit/test_speed_benchmarks.py. Prompts are padded on the left,
responses on the right, all to the longest; logits are computed only where a token is trained.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.speed.stopwatch import Stopwatch
from benchmarks.speed.workloads import EOS, Reward, Workload, answers, model_config, number_tokenizer, prompts

KL_COEF, LAM, CLIP, MAX_GRAD_NORM = 0.05, 0.95, 0.2, 1.0


def run(load: Workload) -> dict[str, Any]:
    """Trains, and returns what was measured."""
    torch.manual_seed(0)
    return {"ppo": _ppo, "sft": _sft}[load.task](load)


def left_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(tokens [B, P], mask [B, P])."""
    width = max(map(len, rows))
    tokens = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _model(load: Workload) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(model_config(load)).eval()
    if load.unfrozen >= 0:
        model.requires_grad_(False)
        for module in (*model.transformer.h[-load.unfrozen :], model.transformer.ln_f):
            module.requires_grad_(True)
    return model


def _optimizer(load: Workload, *modules: nn.Module) -> torch.optim.AdamW:
    trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=load.lr, fused=True)


def _step(optimizer: torch.optim.AdamW, loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _ppo(load: Workload) -> dict[str, Any]:
    ppo, watch, reward = PlainPPO(load), Stopwatch(), Reward()
    for iteration in range(load.warm_up + load.iterations):
        if iteration == load.warm_up:
            watch.reset()
        ppo.iteration(prompts(load), reward, watch)
    return {**watch.result(), "lengths": sorted(reward.lengths)}


class PlainPPO:
    """Policy, reference, value head and optimizer.

    Tensors of a collection: tokens [N, P + R]; attention mask [N, P + R], None if all prompts are equally long, because
    padding on the right needs none; all others [N, R], about the responses.
    """

    def __init__(self, load: Workload):
        self.load, self.model = load, _model(load)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.value = nn.Sequential(nn.Linear(load.width, 2 * load.width), nn.ReLU(), nn.Linear(2 * load.width, 1))
        nn.init.zeros_(self.value[2].weight)
        self.optimizer = _optimizer(load, self.model, self.value)
        self.tokenizer = number_tokenizer(load)

    def iteration(self, prompt_ids: list[list[int]], reward: Reward, watch: Stopwatch) -> None:
        """Samples, scores and updates once."""
        tokens, attention = left_padded(prompt_ids)
        width = tokens.shape[1]
        with watch.within("generate"):
            tokens, mask = self.generate(tokens, attention)
        with watch.within("reward"):
            response = torch.where(mask, tokens[:, width:], EOS)
            scores = torch.tensor(reward(self.tokenizer.batch_decode(response, skip_special_tokens=True)))
        attention = None if attention.all() else torch.cat([attention, mask.long()], dim=1)
        with watch.within("score"):
            old, values, ref = self.score(tokens, attention, mask)
            advantages, returns = self.advantages(scores, old, values, ref, mask)
        with watch.within("update"):
            self.update(tokens, attention, mask, old, values, advantages, returns)
        watch.tokens += self.load.epochs * int(mask.sum())

    @torch.no_grad()
    def generate(self, tokens: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, P + R] and the mask [N, R] of sampled ones: up to and including eos."""
        position, step, cache = _positions(attention), tokens, None
        padded = not attention.all()
        alive, masks = torch.ones(len(tokens), dtype=torch.bool), []
        for _ in range(self.load.new_tokens):
            out = self.model(
                step,
                attention_mask=attention if padded else None,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            drawn = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
            step = torch.where(alive[:, None], drawn, EOS)
            tokens = torch.cat([tokens, step], dim=1)
            attention = torch.cat([attention, torch.ones_like(step)], dim=1)
            position = position[:, -1:] + 1
            masks.append(alive)
            alive = alive & (step[:, 0] != EOS)
            if not alive.any():
                break
        return tokens, torch.stack(masks, dim=1)

    def logprobs(
        self, model: PreTrainedModel, tokens: Tensor, attention: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the responses, 0 outside the mask; the hidden states [B, R, d] before their tokens."""
        position = None if attention is None else _positions(attention)
        hidden = model.base_model(tokens, attention_mask=attention, position_ids=position, use_cache=False)[0]
        start = tokens.shape[1] - mask.shape[1]
        hidden = hidden[:, start - 1 : -1]
        chosen = -F.cross_entropy(model.lm_head(hidden[mask]), tokens[:, start:][mask], reduction="none")
        return torch.zeros(mask.shape).masked_scatter(mask, chosen), hidden

    @torch.no_grad()
    def score(self, tokens: Tensor, attention: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, values and the reference's log-probabilities, in pieces of a batch."""
        columns = []
        for rows in torch.arange(len(tokens)).split(self.load.batch_size):
            batch = tokens[rows], None if attention is None else attention[rows], mask[rows]
            logprobs, hidden = self.logprobs(self.model, *batch)
            columns.append((logprobs, self.value(hidden)[..., 0], self.logprobs(self.reference, *batch)[0]))
        old, values, ref = (torch.cat(parts) for parts in zip(*columns, strict=True))
        return old, values, ref

    def advantages(
        self, scores: Tensor, old: Tensor, values: Tensor, ref: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns."""
        rewards = -KL_COEF * (old - ref) * mask
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
        advantages, advantage, following = torch.zeros_like(rewards), 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            advantage = (rewards[:, t] + following - values[:, t] + LAM * advantage) * mask[:, t]
            advantages[:, t], following = advantage, values[:, t] * mask[:, t]
        returns, chosen = advantages + values, advantages[mask]
        return (advantages - chosen.mean()) / (chosen.var(correction=0) + 1e-8).sqrt(), returns

    def update(
        self,
        tokens: Tensor,
        attention: Tensor | None,
        mask: Tensor,
        old: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> None:
        """All passes over one collection."""
        for _ in range(self.load.epochs):
            for rows in torch.randperm(len(tokens)).split(self.load.batch_size):
                used, adv, ret = mask[rows], advantages[rows], returns[rows]
                padding = None if attention is None else attention[rows]
                logprobs, hidden = self.logprobs(self.model, tokens[rows], padding, used)
                new_values = self.value(hidden)[..., 0]
                ratio = (logprobs - old[rows]).exp()
                policy = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - CLIP, 1 + CLIP))
                near = values[rows] + (new_values - values[rows]).clamp(-CLIP, CLIP)
                value = torch.maximum((new_values - ret) ** 2, (near - ret) ** 2) / 2
                _step(self.optimizer, ((policy + value) * used).sum() / used.sum())


def _positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(1) - 1).clamp(min=0)


def _sft(load: Workload) -> dict[str, Any]:
    model, watch = _model(load), Stopwatch(rest="update")
    optimizer = _optimizer(load, model)
    samples = [[*prompt, *answer, EOS] for prompt, answer in zip(prompts(load), answers(load), strict=True)]
    lengths = torch.tensor([len(ids) for ids in samples])
    watch.reset()
    for _ in range(load.iterations):
        for rows in torch.randperm(len(samples)).split(load.batch_size):
            widest = int(lengths[rows].max())
            tokens = torch.tensor([samples[row] + [EOS] * (widest - len(samples[row])) for row in rows])
            used = torch.arange(widest) < lengths[rows, None]  # a mask of attention would change nothing
            hidden = model.base_model(tokens, use_cache=False)[0][:, :-1]
            _step(optimizer, F.cross_entropy(model.lm_head(hidden[used[:, 1:]]), tokens[:, 1:][used[:, 1:]]))
            watch.tokens += int(used[:, 1:].sum())
    return {**watch.result(), "lengths": []}
