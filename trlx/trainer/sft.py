"""Supervised fine-tuning on texts and dialogues."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trlx.batch import TokenBatch, TokenOutputs
from trlx.data.dialogue import dialogues
from trlx.methods.masked import Metrics
from trlx.methods.sft import sft_loss
from trlx.trainer.base import Trainer


class SFTTrainer(Trainer):
    """Cross-entropy on the outputs of dialogues, or on all of a plain text."""

    def make_experience(self, samples: list[Any], seq_length: int) -> None:
        """Tokenizes the samples: texts, or alternating prompts and outputs; at most `seq_length` tokens each."""
        special_tokens = self.backend.row_format.special_tokens
        self.learn_from(dialogues(samples, self.tokenizer, seq_length, special_tokens=special_tokens))

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return sft_loss(outputs, batch)
