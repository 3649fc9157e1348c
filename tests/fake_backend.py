"""A backend without a model: what it samples and how it scores tokens stands in tables, to do sums by hand."""

from __future__ import annotations

from typing import ClassVar

import torch

from trlx.backends.base import Backend
from trlx.batch import Sample, TokenBatch, TokenOutputs
from trlx.methods.masked import finish, pack
from trlx.sampling.base import Sampler
from trlx.trainer.ppo import PPOTrainer


class FakeSampler(Sampler):
    """Answers each prompt as `FakeBackend.responses` says."""

    def generate(self, prompts, sampling):
        return [Sample(list(FakeBackend.responses[tuple(prompt)]), version=self.version) for prompt in prompts]


class FakeBackend(Backend):
    """One process; every token has one log-probability under the policy, one under the reference, and one value."""

    responses: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    """By prompt."""
    logprobs: ClassVar[dict[int, float]] = {}
    ref_logprobs: ClassVar[dict[int, float]] = {}
    values: ClassVar[dict[int, float]] = {}
    """Of the state before the token; each of the three by token."""

    microbatch_size = 1
    data_rank, data_size, is_main, device = 0, 1, True, torch.device("cpu")
    starts_at_reference, fingerprint = False, "fake"

    def __init__(self, model, optimizer, scheduler, train, tokenizer, needs):
        self.needs = needs
        self.trained: list[TokenBatch] = []

    def sampler(self):
        return FakeSampler()

    def evaluate(self, batch, reference=False):
        logprobs = self._column(batch, self.ref_logprobs if reference else self.logprobs)
        return TokenOutputs(logprobs, None if reference else self._column(batch, self.values))

    def train_step(self, batch, loss, unit):
        self.trained.append(batch)
        _, metrics = loss(self.evaluate(batch), batch)
        return {**finish(*pack(metrics)), "grad_norm": 1.0, "skipped_steps": 0.0}

    def _column(self, batch: TokenBatch, table: dict[int, float]) -> torch.Tensor:
        found = [[table.get(token, float("nan")) for token in row] for row in batch.tokens.tolist()]
        return torch.tensor(found).where(batch.response_mask, 0.0)

    def update_heads(self, fn):
        raise NotImplementedError

    def sum_across(self, tensor):
        return tensor

    def max_across(self, tensor):
        return tensor

    def gather_objects(self, objects):
        return list(objects)

    def broadcast_object(self, value):
        return value

    def barrier(self):
        pass

    def save(self, folder, optimizer=True):
        raise NotImplementedError

    def load(self, folder):
        raise NotImplementedError

    def export_hf(self, folder, merge=False):
        raise NotImplementedError

    def parameter_counts(self):
        raise NotImplementedError


class FakePPOTrainer(PPOTrainer):
    """PPO on it."""

    backend_class = FakeBackend
