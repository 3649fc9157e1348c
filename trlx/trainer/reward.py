"""Reward models: one number for a prompt and an answer, learnt from pairs of answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.backends.base import Backend, ModelNeeds
from trlx.batch import Rollout, TokenBatch, TokenOutputs
from trlx.data.preferences import pairs
from trlx.data.store import RolloutStore
from trlx.method_configs import RewardConfig
from trlx.methods.masked import Metrics
from trlx.methods.reward import calibration_error, reward_loss
from trlx.methods.units import Unit
from trlx.trainer.base import Trainer
from trlx.trainer.evaluate import EvaluationResult, evaluated

logger = logging.get_logger(__name__)

SHOWN = 32
"""Pairs in the table of an evaluation."""


class RewardTrainer(Trainer):
    """Learns which of two answers is better. It has scores and no language model, so it generates nothing."""

    method_class = RewardConfig
    unit = Unit.PAIR
    generates = False
    best_by = ("eval/accuracy",)

    def __init__(self, config, reward_fn=None, metric_fn=None, stop_sequences=None):
        given = {"reward_fn": reward_fn, "metric_fn": metric_fn, "stop_sequences": stop_sequences}
        sampler = None if config.train.sampler == "auto" else config.train.sampler
        for name, value in {**given, "train.sampler": sampler}.items():
            if value:
                raise ValueError(f"A reward model generates nothing, so nothing would use {name}: leave it out")
        super().__init__(config)

    @staticmethod
    def needs(method: RewardConfig) -> ModelNeeds:
        return ModelNeeds(score_head=True)

    def make_experience(self, samples: Any, seq_length: int) -> None:
        """Tokenizes pairs, see `whole_pairs`; at most `seq_length` tokens for prompt and answer."""
        self.learn_from(whole_pairs(samples, self.tokenizer, seq_length))

    def add_eval_samples(self, samples: Any, seq_length: int) -> None:
        """Sets the pairs of evaluations."""
        store = self.store_of(whole_pairs(samples, self.tokenizer, seq_length))
        self.evaluator = PairEvaluator(self.backend, self.tokenizer, store)

    def loss(self, outputs: TokenOutputs, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        return reward_loss(outputs, batch, self.method.center_coef)

    def draw(self, *_: Any) -> NoReturn:
        """Raises a TypeError: there is nothing to draw from."""
        raise TypeError(
            "A reward model scores texts and generates none: save_pretrained(folder), then call "
            "trlx.SequenceClassifierReward(folder)(samples=[...])"
        )


def whole_pairs(samples: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Rollout]:
    """`pairs` without those of which an answer does not end within `max_length`: the score is read at its eos.

    With a tokenizer that truncates on the left, long pairs lose their beginning instead.

    Raises:
        ValueError: no pair is left; or see `pairs`.
    """
    limit = max_length if tokenizer.truncation_side == "left" else sys.maxsize
    rows = pairs(samples, tokenizer, limit)
    both = list(zip(rows[0::2], rows[1::2], strict=True))
    kept = [pair for pair in both if all(len(row.prompt) + len(row.response) <= max_length for row in pair)]
    said = (
        f"{len(both) - len(kept)} of {len(both)} pairs were dropped, because an answer ends behind train.seq_length "
        f"({max_length}): raise it, or write left in tokenizer.truncation_side to cut the beginning instead"
    )
    if not kept:
        raise ValueError(said)
    if len(kept) < len(both):
        logger.warning(said)
    return [row for pair in kept for row in pair]


@dataclass(slots=True)
class PairEvaluator:
    """Scores held-out pairs."""

    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    store: RolloutStore

    def run(self, step: int = 0) -> EvaluationResult:
        """Call it on every process; each gets the same result."""
        together, backend = Unit.PAIR.rows, self.backend
        found: list[list[float]] = []
        for batch, outputs in evaluated(backend, self.store, together):
            scores = outputs.last.view(-1, together)  # [pairs, 2]
            found += backend.gather_objects(scores[batch.response_mask.any(dim=1)[0::2]].tolist())
        rewards = torch.tensor(found)
        margins = torch.tensor([float(rollout.score) for rollout in self.store.rollouts[0::2]])
        ahead = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "eval/loss": float(-logsigmoid(ahead - margins).mean()),
            "eval/accuracy": float((ahead > 0).float().mean()),
            "eval/calibration_error": calibration_error(ahead),
            "eval/margin": float(ahead.mean()),
            "eval/rewards/mean": float(rewards.mean()),
            "eval/rewards/std": float(rewards.std()),
        }
        texts = [self.tokenizer.decode(r.prompt + r.response) for r in self.store.rollouts[: SHOWN * together]]
        table = [[*texts[2 * pair : 2 * pair + 2], *scores] for pair, scores in enumerate(found[:SHOWN])]
        columns = ["chosen", "rejected", "reward of chosen", "reward of rejected"]
        return EvaluationResult(metrics, columns, table)
