"""Learning from preferences: which of two answers to a prompt was chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trlx import logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.preferences import pairs
from trlx.data.store import RolloutStore, own_rows, shard
from trlx.method_configs import DPOConfig
from trlx.methods.masked import Metrics
from trlx.methods.preferences import dpo_loss
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
