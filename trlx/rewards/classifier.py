"""A reward model as reward_fn, or in a function of the user's."""

from __future__ import annotations

import copy
import re
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

from trlx.data.hub import check_source, no_bars
from trlx.tracebacks import short_errors


class SequenceClassifierReward:
    """A reward_fn that scores whole samples with a sequence classifier.

    ``trlx.train(reward_fn=SequenceClassifierReward("lvwerra/distilbert-imdb", label="POSITIVE"), prompts=[...])``

    The score is the logit of a model with one label, and the probability of `label` for a model with several. The
    policy's eos text at the end of a sample (train.eos_in_outputs) is removed, as the classifier does not know it.
    Raises an OSError if there is no model of that name, and a ValueError if `label` or the tokenizer does not fit, or
    (when it loads) if the model has no weights for its scores.

    Args:
        model: hub name or folder, loaded on the first call, so that only processes that score hold it; or a model.
        tokenizer: hub name, folder or tokenizer (copied); by default the one beside the model.
        device: by default a given model stays where it is, and a loaded one goes to the first accelerator.
        batch_size: samples per forward pass; samples of similar length go together.
        max_length: tokens of a sample that the model reads; by default as many as it can.
        label: index or name of the label whose probability is the score; not for models with one label.
        dtype: of the weights of a loaded model, e.g. ``torch.bfloat16``; by default as saved.
        truncation_side: where longer samples are cut: "left" (the response stays) or "right".
    """

    @short_errors
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
        check_source(model, "the reward model")
        given = isinstance(model, PreTrainedModel)
        beside = model.name_or_path if given else model
        self._source, self._device, self._dtype = model, device, dtype
        self.batch_size = batch_size
        self.config = model.config if given else AutoConfig.from_pretrained(model)
        self.tokenizer = _tokenizer(beside if tokenizer is None else tokenizer, truncation_side)
        self.label = _label_index(self.config, label)
        self.max_length = max_length or _longest(self.config, self.tokenizer)

    def __call__(self, samples: Sequence[str], tokenizer: Any = None, **kwargs: Any) -> list[float]:
        """One number per sample. `tokenizer` is the policy's; other arguments of a reward_fn are ignored."""
        if not samples:
            return []
        eos = getattr(tokenizer, "eos_token", None) or ""
        encoded = self._encoded([sample.removesuffix(eos) for sample in samples])
        lengths = torch.tensor([len(row["input_ids"]) for row in encoded])
        scores = torch.empty(len(encoded))
        # not transformers' pipeline: its DataLoader draws from torch's global generator, as sampling does meanwhile
        for rows in lengths.argsort(descending=True, stable=True).split(self.batch_size):
            scores[rows] = self._scores([encoded[row] for row in rows])
        return scores.tolist()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The classifier, ready to be called."""
        model, device = self._source, self._device
        if not isinstance(model, PreTrainedModel):
            with no_bars():
                model = _loaded(model, self._dtype)
            device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        # decoders classify at the last token that is not this one
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model.eval() if device is None else model.eval().to(device)

    def _encoded(self, samples: list[str]) -> list[dict[str, list[int]]]:
        """The model's inputs for each sample, without padding."""
        ends = [self.tokenizer.eos_token_id] if getattr(self.config, "trlx_scores_eos", False) else []
        length = self.max_length and self.max_length - len(ends)
        if ends:  # it learned from texts with one eos
            special = "|".join(map(re.escape, (self.tokenizer.eos_token, self.tokenizer.pad_token)))
            samples = [re.sub(rf"(?:{special})+\Z", "", sample) for sample in samples]
        columns = self.tokenizer(samples, verbose=False, truncation=length is not None, max_length=length)
        for name, rows in columns.items() if ends else ():  # a reward model of trlx reads its score there
            for row in rows:
                row += ends if name == "input_ids" else [int(name == "attention_mask")]
        # a model needs a token, and an empty text has none unless the tokenizer adds special ones
        nothing = {**{name: [0] for name in columns}, "input_ids": [self.tokenizer.pad_token_id], "attention_mask": [1]}
        rows = [{name: columns[name][index] for name in columns} for index in range(len(samples))]
        return [row if row["input_ids"] else nothing for row in rows]

    @torch.inference_mode()
    def _scores(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """[B], on the CPU."""
        self.model.eval()  # the caller may have called train() on it
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
        logits = self.model(**batch).logits.float().cpu()  # [B, labels]
        if self.label is None:
            return logits[:, 0]
        independent = self.config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if independent else logits.softmax(dim=1))[:, self.label]


def _loaded(source: str, dtype: torch.dtype | None) -> PreTrainedModel:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source, dtype=dtype or "auto", output_loading_info=True
    )
    head = sorted(name for name in info["missing_keys"] if not name.startswith(f"{model.base_model_prefix}."))
    if head:
        problem = f"is a language model, not a classifier (it has no {head[0]!r})"
        raise ValueError(f"{source} {problem}: train one with config='reward'")
    return model


def _tokenizer(source: str | PreTrainedTokenizerBase, truncation_side: str) -> PreTrainedTokenizerBase:
    if truncation_side not in ("left", "right"):
        raise ValueError(f'truncation_side must be "left" or "right", got {truncation_side!r}')
    if not source:
        raise ValueError("The reward model has no name_or_path to load a tokenizer from: pass tokenizer")
    given = isinstance(source, PreTrainedTokenizerBase)
    tokenizer = copy.deepcopy(source) if given else AutoTokenizer.from_pretrained(source)
    tokenizer.truncation_side, tokenizer.padding_side = truncation_side, "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The reward model's tokenizer has neither a pad nor an eos token: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _label_index(config: Any, label: int | str | None) -> int | None:
    """The index of the logit to read; None for a model with one label."""
    if config.num_labels == 1:
        if label is not None:
            raise ValueError(f"The reward model has one label only, so leave out label={label!r}")
        return None
    index = config.label2id.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < config.num_labels:
        known = ", ".join(f"{index} ({name!r})" for index, name in config.id2label.items())
        problem = "needs label=..." if label is None else f"has no label {label!r}"
        raise ValueError(f"The reward model {problem}; its labels are {known}")
    return index


def _longest(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that the model can read; None if neither its config nor its tokenizer sets a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**9]
    return min(limits, default=None)
