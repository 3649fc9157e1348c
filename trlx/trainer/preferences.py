"""Learning from preferences: which of two answers to a prompt was chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trlx import logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.preferences import labelled, pairs
from trlx.data.store import RolloutStore, own_rows, shard
from trlx.method_configs import DPOConfig, KTOConfig
from trlx.methods.masked import Metrics
from trlx.methods.preferences import dpo_loss, kto_loss, log_ratios
from trlx.methods.units import Unit
from trlx.trainer.base import Trainer
from trlx.trainer.evaluate import ROWS_AT_ONCE, HeldOut

logger = logging.get_logger(__name__)


class DPOTrainer(Trainer):
    """Direct preference optimization, and the losses that differ from it in one line.

    The reference policy, which is the model before training, reads every answer once, before the first step.
    """

    method_class = DPOConfig
    unit = Unit.PAIR

    @staticmethod
    def needs(method: DPOConfig) -> ModelNeeds:
        # with dropout the policy would differ from the reference before it has learnt anything
        return ModelNeeds(reference=True, dropout=False)

    def make_experience(self, samples: Any, seq_length: int) -> None:
        """Tokenizes pairs, see `trlx.data.preferences.pairs`; at most `seq_length` tokens for prompt and answer."""
        self.learn_from(self._pairs(samples, seq_length))

    def add_eval_samples(self, samples: Any, seq_length: int) -> None:
        """Sets the pairs of evaluations. Call it on every process, after `add_eval_pipeline`."""
        store = RolloutStore(self._pairs(samples, seq_length), self.tokenizer.pad_token_id, self.backend.row_format)
        add_reference(self.backend, store, self.rows_together)
        self.evaluator.held_out = HeldOut(self.backend, store, self.loss, self.rows_together)

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets the pairs, and adds the reference's log-probabilities of their tokens. Call it on every process."""
        super().learn_from(rollouts)
        add_reference(self.backend, self.samples, self.rows_together)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        return dpo_loss(
            outputs,
            batch,
            kind=method.loss_type,
            beta=method.beta,
            label_smoothing=method.label_smoothing,
            sft_coef=method.sft_coef,
            length_normalized=method.length_normalized,
        )

    def _pairs(self, samples: Any, seq_length: int) -> list[Rollout]:
        return pairs(samples, self.tokenizer, seq_length, self.backend.row_format.special_tokens)


class KTOTrainer(Trainer):
    """Kahneman-Tversky optimization: answers with a label, good or bad, and no pairs.

    Before each step the policy reads the batch's prompts with answers to other prompts, for the KL to the reference.
    """

    method_class = KTOConfig
    unit = Unit.SEQUENCE
    kl: float = 0.0
    """Of policy and reference, on the present batch; at least 0."""

    @staticmethod
    def needs(method: KTOConfig) -> ModelNeeds:
        return ModelNeeds(reference=True, dropout=False)

    def make_experience(self, samples: Any, seq_length: int) -> None:
        """Tokenizes answers, see `trlx.data.preferences.labelled`; at most `seq_length` tokens with the prompt."""
        self.learn_from(labelled(samples, self.tokenizer, seq_length, self.backend.row_format.special_tokens))

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets the answers, and adds the reference's log-probabilities of their tokens. Call it on every process."""
        super().learn_from(rollouts)
        others, longest = [*rollouts[1:], *rollouts[:1]], self.config.train.seq_length
        mismatched = []
        for rollout, other in zip(rollouts, others, strict=True):
            room = slice(longest - len(rollout.prompt))
            trained = other.trained and other.trained[room]
            mismatched.append(Rollout(rollout.prompt, other.response[room], trained=trained))
        self.mismatched = RolloutStore(mismatched, self.tokenizer.pad_token_id, self.backend.row_format)
        for store in (self.samples, self.mismatched):
            add_reference(self.backend, store)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        weights = method.desirable_weight, method.undesirable_weight
        return kto_loss(outputs, batch, self.kl, method.beta, *weights)

    def _next_batch(self) -> TokenBatch:
        batch, backend = super()._next_batch(), self.backend
        rows = self.schedule.rows(len(self.store))
        other = shard(self.mismatched, rows, backend.data_rank, backend.data_size)
        ratios = log_ratios(backend.evaluate(other), other).sum()
        total, count = backend.sum_across(torch.stack([ratios, other.response_mask.any(dim=1).sum()])).tolist()
        self.kl = max(total / count, 0.0)
        return batch


def add_reference(backend: Backend, store: RolloutStore, together: int = 1) -> None:
    """Writes the reference's log-probabilities on every rollout; the processes share blocks of `together` rows."""
    logger.info(f"The reference policy reads {len(store)} answers")
    found = []
    for first in range(0, len(store), ROWS_AT_ONCE * backend.data_size):
        rows = list(range(len(store)))[first : first + ROWS_AT_ONCE * backend.data_size]
        batch = shard(store, rows, backend.data_rank, backend.data_size, together)
        logprobs = backend.evaluate(batch, reference=True).logprobs.tolist()
        ends = batch.attention_mask.sum(dim=1).tolist()
        mine = rows[own_rows(len(rows), backend.data_rank, backend.data_size, together)]
        for index, row, end in zip(mine, logprobs, ends, strict=False):  # other rows only fill up a short share
            found.append((index, row[end - len(store.rollouts[index].response) : end]))
    for index, numbers in backend.gather_objects(found):
        store.rollouts[index].ref_logprobs = numbers
