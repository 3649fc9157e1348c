"""Supervised fine-tuning on texts and dialogues."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.methods.masked import Metrics
from trlx.methods.sft import sft_loss
from trlx.trainer.offline import OfflineTrainer


class SFTTrainer(OfflineTrainer):
    """Cross-entropy on the outputs of dialogues, or on all of a plain text."""

    def make_experience(self, samples: list[Any], seq_length: int) -> None:
        """Tokenizes the samples: texts, or alternating prompts and outputs; at most `seq_length` tokens each."""
        self.learn_from(self.tokenize(samples, seq_length))

    def loss(self, scores: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return sft_loss(scores, batch)
