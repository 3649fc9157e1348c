"""Reward models: a classifier of texts as reward_fn or inside one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


class SequenceClassifierReward:
    """The opinion of a sequence classifier on whole samples, as reward_fn.

    ``trlx.train(reward_fn=SequenceClassifierReward("lvwerra/distilbert-imdb", label="POSITIVE"), prompts=[...])``

    A model with one label gives its logit; one with several the probability of `label`. The eos text that ends samples
    under train.eos_in_outputs is cut off first: it is a word of the policy's tokenizer, not of this one.

    Args:
        model: hub name or folder, loaded when first called, so that only the processes that score hold it; or a model,
            which is then used as it is, in evaluation mode.
        tokenizer: hub name, folder or tokenizer (copied); by default the one beside the model.
        device: where the model is moved; by default a model given stays, one loaded goes to the first accelerator.
        batch_size: samples per forward pass; similar lengths go together.
        max_length: tokens that are read of a sample; by default as many as the model can read.
        label: index or name of the label asked for; not for models with one label.
        dtype: of the weights that are loaded, e.g. ``torch.bfloat16``; by default as saved.
        truncation_side: where longer samples are cut: "left" (the response stays) or "right".

    Raises:
        ValueError: the label is missing, unknown or of no use, or the tokenizer has nothing to pad with.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        label: int | str | None = None,
        dtype: torch.dtype | None = None,
        truncation_side: str = "left",
    ):
        self._source = model
        self._device = device
        self._dtype = dtype
        self.batch_size = batch_size
        self.config = model.config if isinstance(model, PreTrainedModel) else AutoConfig.from_pretrained(model)
        beside = model.name_or_path if isinstance(model, PreTrainedModel) else model
        self.tokenizer = _tokenizer(beside if tokenizer is None else tokenizer, truncation_side)
        self.label = _label_index(self.config, label)
        self.max_length = max_length or _longest(self.config, self.tokenizer)

    def __call__(self, samples: Sequence[str], tokenizer: Any = None, **kwargs: Any) -> list[float]:
        """One number per sample. Takes what reward_fn is given; of that, `samples` and the policy's `tokenizer`."""
        eos = getattr(tokenizer, "eos_token", None) or ""
        encoded = self._encoded([sample.removesuffix(eos) for sample in samples])
        by_length = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
        scores = [0.0] * len(encoded)
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            for index, score in zip(rows, self._scores([encoded[index] for index in rows]), strict=True):
                scores[index] = score
        return scores

    @cached_property
    def model(self) -> PreTrainedModel:
        """The classifier, ready to be called."""
        model, device = self._source, self._device
        if not isinstance(model, PreTrainedModel):
            how = {} if self._dtype is None else {"dtype": self._dtype}
            model = AutoModelForSequenceClassification.from_pretrained(model, **how)
            device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        # decoders read their answer off the last token that is no padding, which they tell by this id
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.eval() if device is None else model.eval().to(device)

    def _encoded(self, samples: list[str]) -> list[dict[str, list[int]]]:
        """What the model reads of each sample, without padding."""
        if not samples:
            return []
        limit = {"truncation": self.max_length is not None, "max_length": self.max_length}
        columns = self.tokenizer(samples, verbose=False, **limit)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        # an empty text has no tokens where the tokenizer adds none, but a model needs one to read
        nothing = {**{name: [0] for name in columns}, "input_ids": [self.tokenizer.pad_token_id], "attention_mask": [1]}
        return [row if row["input_ids"] else nothing for row in rows]

    @torch.inference_mode()
    def _scores(self, rows: list[dict[str, list[int]]]) -> list[float]:
        self.model.eval()  # somebody may have trained with the model meanwhile
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
        return self._chosen(self.model(**batch).logits.float()).tolist()

    def _chosen(self, logits: Tensor) -> Tensor:
        """[B] of [B, labels]."""
        if self.label is None:
            return logits[:, 0]
        independent = self.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if independent else logits.softmax(dim=1))[:, self.label]


def _tokenizer(source: str | PreTrainedTokenizerBase, truncation_side: str) -> PreTrainedTokenizerBase:
    if truncation_side not in ("left", "right"):
        raise ValueError(f'truncation_side must be "left" or "right", got {truncation_side!r}')
    if not source:
        raise ValueError("The reward model was not loaded from anywhere, so its tokenizer is not known: pass tokenizer")
    given = isinstance(source, PreTrainedTokenizerBase)
    tokenizer = copy.deepcopy(source) if given else AutoTokenizer.from_pretrained(source)
    tokenizer.truncation_side, tokenizer.padding_side = truncation_side, "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The reward model's tokenizer has neither a pad nor an eos token: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _label_index(config: Any, label: int | str | None) -> int | None:
    """The column of the logits to read; None where there is but one."""
    known = ", ".join(f"{index} ({name!r})" for index, name in config.id2label.items())
    if config.num_labels == 1:
        if label is not None:
            raise ValueError(f"The reward model has one label only, so leave out label={label!r}")
        return None
    index = config.label2id.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < config.num_labels:
        problem = "needs label=..." if label is None else f"has no label {label!r}"
        raise ValueError(f"The reward model {problem}; its labels are {known}")
    return index


def _longest(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model can read; None where neither its config nor its tokenizer sets a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=None)
