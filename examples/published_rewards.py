"""Reward models that were published for trlx: GPT-J with a linear head, as one file of weights."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trlx
from examples.common import RewardFn

UNUSED = "<|extratoken_1|>"
"""A token of GPT-J that no text has. It pads here, since eos is a token that some of these models read."""


def load_gptj_reward(
    base: str, checkpoint: str, revision: str | None = None, begin: str = "", end: str = ""
) -> RewardFn:
    """The weights of `checkpoint` in the architecture of `base`, in half precision on the last GPU.

    Their head, ``v_head``, is what transformers calls ``score`` in a classifier with one label. They judge a text at
    its last token, and want `begin` and `end` around it as in their training.
    """
    folder = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=["*.bin", "*.pt"]))
    (file,) = [*folder.glob("*.bin"), *folder.glob("*.pt")]
    weights = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float16)
    renamed = {name.replace("v_head.", "score."): tensor for name, tensor in weights.items()}
    absent = model.load_state_dict(renamed, strict=False).missing_keys
    if absent:
        raise ValueError(f"{checkpoint} has no weights for {', '.join(absent[:5])}: is {base} its base model?")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = UNUSED
    gpus = torch.cuda.device_count()
    judge = trlx.SequenceClassifierReward(
        model, tokenizer, device=f"cuda:{gpus - 1}" if gpus else "cpu", max_length=1024
    )

    def reward_fn(samples, tokenizer=None, **kwargs):
        eos = tokenizer.eos_token if tokenizer else ""
        return judge([begin + sample.removesuffix(eos) + end for sample in samples])

    return reward_fn
