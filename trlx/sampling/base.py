"""The interface of samplers, which draw responses from the policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx.batch import Sample
from trlx.registry import samplers
from trlx.sampling.settings import SamplingConfig
from trlx.strict import check_keywords

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Returns (Hugging Face name, whole tensor) of each weight of the language model, on one process alone. Every process
calls it and reads it to its end, as all of them gather the weights together."""


class Sampler(ABC):
    """Draws responses from the policy: from the weights that train, or from a copy of them."""

    version: int = 0
    """The number of optimizer steps behind the weights that it draws from now."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """Draws one response for each of this process's prompts. Called equally often on every process, also with no
        prompts. Equal neighbours are samples of one prompt, so a sampler may read that prompt once."""

    def check(self, sampling: SamplingConfig) -> None:
        """Checks, before anything is sampled, that `generate` supports these settings.

        Raises:
            ValueError: it does not support one; the message names it.
        """

    def sync(self, version: int, weights: Weights) -> None:
        """Makes the sampler use the weights of `version`. Called on every process before it samples.

        A sampler that holds a copy of the weights calls ``weights()`` once for each version.
        """
        self.version = version

    def close(self) -> None:
        """Stops what the sampler has started. Called when the trainer is deleted, and at the end of the program."""


def checked(sampler: Sampler, samples: list[Sample], count: int, vocab_size: int) -> list[Sample]:
    """The samples that `sampler` drew for `count` prompts.

    Raises:
        ValueError: the number of samples, a token id or the number of log-probabilities is wrong.
    """
    returned = f"{type(sampler).__name__}.generate returned"
    if len(samples) != count:
        raise ValueError(f"{returned} {len(samples)} samples for {count} prompts: return one for each")
    for index, (ids, logprobs) in enumerate((sample.ids, sample.logprobs) for sample in samples):
        if not ids or not all(0 <= token < vocab_size for token in ids):
            wanted = f"return at least one id, each from 0 to {vocab_size - 1}"
            raise ValueError(f"{returned} the ids {ids[:8]} as sample {index}: {wanted}")
        if logprobs is not None and len(logprobs) != len(ids):
            wanted = "return one for each, or None"
            raise ValueError(f"{returned} {len(logprobs)} logprobs for the {len(ids)} ids of sample {index}: {wanted}")
    return samples


def sampler_for(settings: Any, backend: Any, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler for ``train.sampler``.

    Args:
        settings: "auto" (the backend's own), a registered name, or a dict: the name as ``engine``, and its arguments.
        backend: passed with `tokenizer` to the class of a registered sampler.

    Raises:
        ValueError: the name is unknown, or the sampler does not take an argument.
    """
    arguments = dict(settings) if isinstance(settings, Mapping) else {"engine": settings}
    engine = arguments.pop("engine")
    if engine == "auto":
        check_keywords(backend.sampler, arguments, "train.sampler")
        return backend.sampler()
    cls = samplers.get(engine)
    check_keywords(cls, arguments, "train.sampler", ours=("backend", "tokenizer"))
    return cls(backend=backend, tokenizer=tokenizer, **arguments)
