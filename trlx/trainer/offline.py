"""What methods share that learn from samples they are given."""

from __future__ import annotations

from typing import Any

from trlx.batch import Rollout
from trlx.data.dialogue import dialogues
from trlx.data.store import RolloutStore
from trlx.trainer.base import Trainer


class OfflineTrainer(Trainer):
    """Trains on all of its samples in every epoch, in another order each time."""

    online = False

    def tokenize(self, samples: list[Any], seq_length: int, scores: list[float] | None = None) -> list[Rollout]:
        """The samples as rollouts of at most `seq_length` tokens, each with its score; see `dialogues`."""
        special_tokens = self.backend.row_format.special_tokens
        return dialogues(samples, self.tokenizer, seq_length, scores, special_tokens)

    def learn_from(self, rollouts: list[Rollout]) -> None:
        """Sets what every epoch trains on."""
        self.samples = self.store = RolloutStore(rollouts, self.tokenizer.pad_token_id, self.backend.row_format)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.samples)

    @property
    def data_digest(self) -> str:
        return self.samples.digest()

    def collect(self) -> RolloutStore:
        return self.samples
