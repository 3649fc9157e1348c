"""Functions of CarperAI's trlx that have no successor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trlx.checkpoint import seed_everything
from trlx.data.dialogue import dialogues
from trlx.data.store import RolloutStore
from trlx.methods.ilql import normalize_returns
from trlx.presets import megatron_preset

default_nemo_1_3b_config = partial(megatron_preset, "megatron_1.3b")
default_nemo_2b_config = partial(megatron_preset, "megatron_2b")
default_nemo_20b_config = partial(megatron_preset, "megatron_20b")


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch with `seed` plus the number of this process."""
    seed_everything(seed + int(os.environ.get("RANK") or 0))


@dataclass
class DialogMessage:
    """One turn of a dialogue: token ids, and whether the model said them."""

    is_output: bool
    tokens: tuple[int, ...]


def tokenize_dialogue(dialogue: str | Sequence[str], tokenizer: Any, max_length: int = 2048) -> list[DialogMessage]:
    """The turns of one sample, see `trlx.data.dialogue.dialogues`. Successive turns of one speaker become one.

    Raises:
        ValueError: the dialogue does not alternate prompt and output, or no token of an output is left.
    """
    sample = dialogue if isinstance(dialogue, str) else list(dialogue)
    (rollout,) = dialogues([sample], tokenizer, max_length)
    trained = rollout.trained or [True] * len(rollout.response)
    ids = [*rollout.prompt, *rollout.response]
    flags = iter([False] * len(rollout.prompt) + trained)
    return [DialogMessage(is_output, tuple(turn)) for is_output, turn in groupby(ids, lambda _: next(flags))]


class DialogStore:
    """Tokenized dialogues as Hugging Face training rows; labels are -100 except for outputs."""

    def __init__(self, dialogs: Sequence[Sequence[DialogMessage]], tokenizer: Any):
        self.tokenizer = tokenizer
        self.history = [self._row(dialog) for dialog in dialogs]

    def __len__(self) -> int:
        return len(self.history)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.history[index]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.history)

    def create_loader(self, batch_size: int, shuffle: bool = False) -> DataLoader:
        """Batches of input_ids, attention_mask and labels, padded on the tokenizer's padding side."""
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, collate_fn=self._collate)

    def _row(self, dialog: Sequence[DialogMessage]) -> dict[str, Tensor]:
        ids = torch.tensor([token for turn in dialog for token in turn.tokens])
        is_output = torch.tensor([turn.is_output for turn in dialog for _ in turn.tokens])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~is_output, -100)}

    def _collate(self, rows: list[dict[str, Tensor]]) -> Any:
        inputs = {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask")}
        batch = self.tokenizer.pad(inputs, return_tensors="pt")
        labels = self.tokenizer.pad({"input_ids": [row["labels"] for row in rows]}, return_tensors="pt")["input_ids"]
        batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def make_experience(
    samples: Sequence[Any], rewards: Sequence[float], tokenizer: Any, max_length: int = 2048, verbose: bool = True
) -> Any:
    """ILQL's data: a `trlx.data.store.RolloutStore` with rewards normalised over all samples."""
    rollouts = dialogues(samples, tokenizer, max_length, scores=[float(reward) for reward in rewards])
    for rollout, score in zip(rollouts, normalize_returns([r.score for r in rollouts]), strict=True):
        rollout.score = score
    return RolloutStore(rollouts, tokenizer.pad_token_id)


def whiten(xs: Tensor, shift_mean: bool = True, distributed: bool = False, group: Any = None) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean again without `shift_mean`; the variance is unbiased.

    Raises:
        NotImplementedError: `distributed` or `group` ask for the numbers of other processes.
    """
    if distributed or group is not None:
        raise NotImplementedError(
            "whiten() uses the numbers of this process only; trainers whiten with trlx.methods.masked.whiten"
        )
    variance, mean = torch.var_mean(xs)
    white = (xs - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def logprobs_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax of `logits` [..., V] at `labels` [...]."""
    return logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def flatten_dict(d: Mapping[str, Any], parent_key: str = "", sep: str = "/") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by `sep`."""
    flat: dict[str, Any] = {}
    for key, value in d.items():
        path = f"{parent_key}{sep}{key}" if parent_key else key
        flat |= flatten_dict(value, path, sep) if isinstance(value, Mapping) else {path: value}
    return flat
