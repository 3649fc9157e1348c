"""What draws responses: the protocol that every sampler keeps."""

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
"""Gives the language model's weights by their Hugging Face names, each whole, on every process."""


class Sampler(ABC):
    """Draws responses from the policy. It may hold the weights that train, or a copy of them somewhere else."""

    version: int = 0
    """Of the weights that it draws from now: the optimizer steps that made them."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """One response for each of this process's prompts. Called on every process equally often; `prompts` may be
        empty. Equal neighbours are the samples of one prompt: what reads the prompt may do so once for all of them."""

    def check(self, sampling: SamplingConfig) -> None:
        """Makes sure, before anything is sampled, that `generate` can do what `sampling` asks.

        Raises:
            ValueError: it cannot; the message names the setting.
        """

    def sync(self, version: int, weights: Weights) -> None:
        """From now on samples are drawn from the weights of `version`. Called on every process before it samples.

        A sampler of the weights that train has nothing to fetch; one that holds a copy calls ``weights()``, once for
        each version.
        """
        self.version = version

    def close(self) -> None:
        """Ends what the sampler started. It is called when the trainer is deleted, and at the end of the program."""


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
    """The sampler that ``train.sampler`` asks for.

    Args:
        settings: "auto", a registered name, or a dict of ``engine``, which is one of them, and keyword arguments.
        backend: makes the sampler of "auto"; a registered one is made with it and the tokenizer.

    Raises:
        ValueError: the name is unknown, or the sampler does not take one of the arguments.
    """
    arguments = dict(settings) if isinstance(settings, Mapping) else {"engine": settings}
    engine = arguments.pop("engine")
    if engine == "auto":
        check_keywords(backend.sampler, arguments, "train.sampler")
        return backend.sampler()
    cls = samplers.get(engine)
    check_keywords(cls, arguments, "train.sampler", ours=("backend", "tokenizer"))
    return cls(backend=backend, tokenizer=tokenizer, **arguments)
