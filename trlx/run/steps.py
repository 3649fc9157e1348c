"""What a run writes about single steps: the batch that a guard fired on, and digests of a step's tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trlx.backends.base import Backend, LossFn
from trlx.batch import TokenBatch
from trlx.config import TrainConfig
from trlx.tracking import DIGESTS
from trlx.tracking.files import plain

Digest = list[Any]
"""[SHA-256 of the bytes, sum, norm] of a tensor."""


def dump(folder: Path, batch: TokenBatch, decode: Callable[[list[int]], str], about: dict[str, Any]) -> None:
    """Writes a batch as ``batch.safetensors``, and as ``about.json`` its texts, the sums of its scores and `about`."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in batch.columns().items()}, folder / "batch.safetensors")
    prompts = batch.attention_mask & ~batch.response_mask
    samples = [
        {"prompt": decode(row[asked].tolist()), "response": decode(row[chosen].tolist()), "score": score}
        for row, asked, chosen, score in zip(
            batch.tokens, prompts, batch.response_mask, batch.scores.sum(dim=1).tolist(), strict=True
        )
    ]
    text = json.dumps(plain({**about, "samples": samples}), indent=1, ensure_ascii=False)
    (folder / "about.json").write_text(text, encoding="utf-8")


def is_recorded(train: TrainConfig, step: int) -> bool:
    """Whether ``train.record_steps`` asks for the digests of a step."""
    asked = train.record_steps
    return step in asked if isinstance(asked, list) else bool(asked) and step % asked == 0


@contextmanager
def recorded(backend: Backend, folder: Path, step: int, batch: TokenBatch, loss: LossFn) -> Iterator[LossFn]:
    """Yields `loss` for one `Backend.train_step`, and appends the digests of what this process held of it to a file:
    its batch, the outputs and the loss of each microbatch, and the gradients and weights of what trains."""
    found = {f"batch.{name}": digest(tensor) for name, tensor in batch.columns().items()}
    passes = 0

    def watched(outputs, microbatch):
        nonlocal passes
        summed, metrics = loss(outputs, microbatch)
        named = {name: getattr(outputs, name) for name in outputs.__slots__}
        tensors = {f"outputs.{name}": x for name, x in named.items() if x is not None} | {"loss": summed}
        found.update({f"{name}[{passes}]": digest(x) for name, x in tensors.items()})
        passes += 1
        return summed, metrics

    def before_update(means):
        gradients = ((name, gradient) for name, _, gradient in backend.trained() if gradient is not None)
        found.update({f"gradient.{name}": digest(gradient) for name, gradient in gradients})
        return decide(means)

    decide, backend.before_update = backend.before_update, before_update
    try:
        yield watched
    finally:
        backend.before_update = decide
    found |= {f"weight.{name}": digest(weight) for name, weight, _ in backend.trained()}
    with open(folder / DIGESTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "tensors": found}) + "\n")


def digest(tensor: Tensor) -> Digest:
    """See `Digest`. Of a weight that is sharded it is that of this process's shard."""
    tensor = getattr(tensor, "_local_tensor", tensor).detach().cpu().contiguous()
    wide = tensor.double()
    read = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else hashlib.sha256()
    return [read.hexdigest()[:16], float(wide.sum()), float(wide.norm())]
