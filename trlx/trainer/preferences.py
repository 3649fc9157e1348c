"""Learning from preferences: which of two answers to a prompt was chosen, or whether an answer was good."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import Tensor

from trlx.backends.base import ModelNeeds
from trlx.backends.interrupts import leave_if_asked
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.preferences import labelled, pairs
from trlx.data.store import RolloutStore, Store, own_rows, shard
from trlx.method_configs import DPOConfig, KTOConfig
from trlx.methods.masked import Metrics, mean_of
from trlx.methods.preferences import dpo_loss, kto_loss, log_ratios
from trlx.methods.units import Unit
from trlx.trainer.base import Trainer
from trlx.trainer.evaluate import ROWS_AT_ONCE, means_over


class PreferenceTrainer(Trainer):
    """Learns by how the policy differs from its reference, the model before training, on given answers.

    The reference reads every answer once, before the first evaluation or epoch that needs it.
    """

    best_by = (*Trainer.best_by, "eval/accuracy")

    @staticmethod
    def needs(method: Any) -> ModelNeeds:
        # with dropout the policy would differ from the reference before it has learnt anything
        return ModelNeeds(reference=True, dropout=False)

    @abstractmethod
    def tokenized(self, samples: Any, seq_length: int) -> list[Rollout]:
        """Tokenizes samples; at most `seq_length` tokens for prompt and answer."""

    def make_experience(self, samples: Any, seq_length: int) -> None:
        """Sets what to train on, see `tokenized`."""
        self.learn_from(self.tokenized(samples, seq_length))

    def add_eval_samples(self, samples: Any, seq_length: int) -> None:
        """Sets the samples of evaluations. Call it on every process, after `add_eval_pipeline`."""
        self.evaluator.held_out = partial(self.held_out_means, self.store_of(self.tokenized(samples, seq_length)))

    def collect(self) -> Store:
        self.add_reference(self.samples)
        return self.samples

    def held_out_means(self, store: RolloutStore) -> dict[str, float]:
        """The metrics of the loss over `store`. Call it on every process."""
        self.add_reference(store)
        return means_over(self.backend, store, self.loss, self.rows_together)

    def add_reference(self, store: RolloutStore) -> None:
        """Writes the reference's log-probabilities on the rollouts that have none. Call it on every process.

        Raises:
            Interrupted: a signal asked the run to leave.
        """
        backend, together = self.backend, self.rows_together
        unread = [index for index, rollout in enumerate(store.rollouts) if rollout.ref_logprobs is None]
        for first in range(0, len(unread), ROWS_AT_ONCE * backend.data_size):
            leave_if_asked(backend)
            self.display.working(f"the reference reads answers {first}/{len(unread)}")
            rows = unread[first : first + ROWS_AT_ONCE * backend.data_size]
            batch = shard(store, rows, backend.data_rank, backend.data_size, together)
            logprobs = backend.evaluate(batch, reference=True).logprobs.tolist()
            ends = batch.attention_mask.sum(dim=1).tolist()
            mine = rows[own_rows(len(rows), backend.data_rank, backend.data_size, together)]
            found = [
                (index, row[end - len(store.rollouts[index].response) : end])
                for index, row, end in zip(mine, logprobs, ends, strict=False)  # other rows only fill up a short share
            ]
            for index, numbers in backend.gather_objects(found):
                store.rollouts[index].ref_logprobs = numbers


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimization, and the losses that differ from it in one line."""

    method_class = DPOConfig
    unit = Unit.PAIR

    def tokenized(self, samples: Any, seq_length: int) -> list[Rollout]:
        """See `trlx.data.preferences.pairs`."""
        return pairs(samples, self.tokenizer, seq_length, self.backend.row_format.special_tokens)

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


class KTOTrainer(PreferenceTrainer):
    """Kahneman-Tversky optimization: answers with a label, good or bad, and no pairs.

    Before each step the policy reads the batch's prompts with answers to other prompts, for the KL to the reference.
    """

    method_class = KTOConfig
    unit = Unit.SEQUENCE
    kl: float = 0.0
    """Of policy and reference, on the present batch or the samples of an evaluation; at least 0."""

    def tokenized(self, samples: Any, seq_length: int) -> list[Rollout]:
        """See `trlx.data.preferences.labelled`."""
        return labelled(samples, self.tokenizer, seq_length, self.backend.row_format.special_tokens)

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets the answers. Call it on every process."""
        super().learn_from(rollouts)
        self.mismatched = self._mismatched(rollouts)

    def add_eval_samples(self, samples: Any, seq_length: int) -> None:
        rollouts = self.tokenized(samples, seq_length)
        self.evaluator.held_out = partial(self._evaluate, self.store_of(rollouts), self._mismatched(rollouts))

    def collect(self) -> Store:
        self.add_reference(self.mismatched)
        return super().collect()

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        method = self.method
        weights = method.desirable_weight, method.undesirable_weight
        return kto_loss(outputs, batch, self.kl, method.beta, *weights)

    def _next_batch(self) -> TokenBatch:
        batch, rollouts = super()._next_batch(), self.mismatched.rollouts
        self.kl = self._kl(self.store_of([rollouts[row] for row in self.schedule.rows(len(self.store))]))
        return batch

    def _evaluate(self, answers: RolloutStore, mismatched: RolloutStore) -> dict[str, float]:
        self.kl = self._kl(mismatched)
        return self.held_out_means(answers)

    def _mismatched(self, rollouts: list[Rollout]) -> RolloutStore:
        """Each prompt with the answer to the next one."""
        others, longest = [*rollouts[1:], *rollouts[:1]], self.config.train.seq_length
        found = []
        for rollout, other in zip(rollouts, others, strict=True):
            room = slice(longest - len(rollout.prompt))
            trained = other.trained and other.trained[room]
            found.append(Rollout(rollout.prompt, other.response[room], trained=trained))
        return self.store_of(found)

    def _kl(self, mismatched: RolloutStore) -> float:
        """The mean of log π / π_ref over answers to other prompts, or 0 if it is negative."""
        self.add_reference(mismatched)
        return max(means_over(self.backend, mismatched, _mean_log_ratio, self.rows_together)["log_ratio"], 0.0)


def _mean_log_ratio(outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    ratios = log_ratios(outputs, batch)[batch.response_mask.any(dim=1)]
    return ratios.sum(), {"log_ratio": mean_of(ratios)}
