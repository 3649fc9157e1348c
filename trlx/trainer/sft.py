"""Supervised fine-tuning on texts and dialogues."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from trlx import logging
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.dialogue import dialogues
from trlx.data.rows import methods_of
from trlx.methods.masked import Metrics
from trlx.methods.sft import sft_loss
from trlx.trainer.base import Trainer
from trlx.trainer.evaluate import means_over

logger = logging.get_logger(__name__)


class SFTTrainer(Trainer):
    """Cross-entropy on the outputs of dialogues, or on all of a plain text."""

    def make_experience(self, samples: list[Any], seq_length: int) -> None:
        """Tokenizes the samples: texts, or alternating prompts and outputs; at most `seq_length` tokens each."""
        if "kto" in methods_of(samples):
            logger.warning(f"{type(self).__name__} ignores the label of samples: write config='kto' to learn from it")
        self.learn_from(self._dialogues(samples, seq_length))

    def add_eval_samples(self, samples: list[Any], seq_length: int) -> None:
        """Sets the samples of evaluations. Call it on every process, after `add_eval_pipeline`."""
        store = self.store_of(self._dialogues(samples, seq_length))
        self.evaluator.held_out = partial(means_over, self.backend, store, self.loss, self.rows_together)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return sft_loss(outputs, batch)

    def _dialogues(self, samples: list[Any], seq_length: int) -> list[Rollout]:
        special_tokens = self.backend.row_format.special_tokens
        return dialogues(samples, self.tokenizer, seq_length, special_tokens=special_tokens)
