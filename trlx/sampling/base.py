"""The interface of samplers, which draw responses from the policy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trlx.batch import Sample
from trlx.registry import samplers
from trlx.sampling.settings import SamplingConfig, cut_at_eos
from trlx.strict import check_keywords, suggestion

ALSO_CALLED = {"loop": "auto", "transformers": "generate"}
"""Further names of samplers."""
Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Returns (Hugging Face name, whole tensor) of each weight of the language model, on the main process alone. Every
process calls it and reads it to its end, as all of them gather the weights together."""


class Sampler(ABC):
    """Draws responses from the policy: from the weights that train, or from a copy of them."""

    exact: bool = False
    """Whether the log-probabilities that it gives may be those of the weights that train, so that a pass over its
    samples can be saved. The first collection of a run is scored all the same, to see how far they are apart."""
    version: int = 0
    """The number of optimizer steps behind the weights that it draws from now."""
    works_ahead: bool = False
    """Whether it can sample while the model trains, see `begin`."""

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

    def begin(self, prompts: list[list[int]], sampling: SamplingConfig) -> None:
        """Begins to sample from the present weights, without waiting. Called as `generate`, if it `works_ahead`."""
        raise NotImplementedError

    def finish(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """What `generate` returns, but for prompts that `begin` had what it drew for them. Each is given once."""
        return self.generate(prompts, sampling)

    def begun(self) -> list[Any]:
        """Waits for what `begin` has begun, and returns it for a checkpoint, as JSON; it stays begun."""
        return []

    def go_on(self, begun: list[Any]) -> None:
        """Takes what `begun` returned in place of what is begun now."""

    def close(self) -> None:
        """Stops what the sampler has started. Called when the trainer is deleted, and at the end of the program."""


def drawn(
    sampler: Sampler, prompts: list[list[int]], sampling: SamplingConfig, vocab_size: int, begun: bool = False
) -> list[Sample]:
    """The samples that `sampler` draws; with `begun` those that it has begun to draw.

    Raises:
        ValueError: they are not what `Sampler.generate` promises; the message names the sampler.
    """
    samples = (sampler.finish if begun else sampler.generate)(prompts, sampling)
    returned = f"{type(sampler).__name__}.generate returned"
    if not (isinstance(samples, list) and len(samples) == len(prompts)):
        count = len(samples) if isinstance(samples, list) else type(samples).__name__
        raise ValueError(f"{returned} {count} for {len(prompts)} prompts: return a list with one Sample for each")
    for index, sample in enumerate(samples):
        problem = _problem(sample, sampling, vocab_size)
        if problem:
            raise ValueError(f"{returned} sample {index} {problem}")
    return samples


def _problem(sample: Sample, sampling: SamplingConfig, vocab_size: int) -> str | None:
    ids, logprobs = sample.ids, sample.logprobs
    if not ids or not all(0 <= token < vocab_size for token in ids):
        return f"with the ids {ids[:8]}: return at least one id, each from 0 to {vocab_size - 1}"
    if len(ids) > sampling.max_new_tokens:
        return f"with {len(ids)} ids: return at most max_new_tokens ({sampling.max_new_tokens})"
    if cut_at_eos(ids, sampling.eos_token_ids) != ids:
        return f"with ids after the eos, {ids[-8:]}: let the first eos end it, without padding"
    if logprobs is not None and len(logprobs) != len(ids):
        return f"with {len(logprobs)} logprobs for {len(ids)} ids: return one for each, or None"
    if logprobs is not None and not all(-math.inf < number < 1e-3 for number in logprobs):
        return "with logprobs that are not finite or above 0: return the log-probability of each id"
    return None


def sampler_for(settings: Any, backend: Any, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler for ``train.sampler``.

    Args:
        settings: "auto" (the backend's own), a registered name, or a dict: the name as ``engine``, and its arguments.
        backend: passed with `tokenizer` to the class of a registered sampler.

    Raises:
        ValueError: the name is unknown, or the sampler does not take an argument.
    """
    arguments = dict(settings) if isinstance(settings, Mapping) else {"engine": settings}
    engine = arguments.pop("engine", "auto")
    engine = ALSO_CALLED.get(engine, engine)
    if engine == "auto":
        check_keywords(backend.sampler, arguments, "train.sampler")
        return backend.sampler(**arguments)
    if engine.lower() not in map(str.lower, samplers.names()):
        known = ["auto", *samplers.names()]
        raise ValueError(f"Unknown sampler {engine!r}.{suggestion(engine, known)} Known: {', '.join(known)}")
    cls = samplers.get(engine)
    check_keywords(cls, arguments, "train.sampler", ours=("backend", "tokenizer"))
    try:
        sampler = cls(backend=backend, tokenizer=tokenizer, **arguments)
    except TypeError as error:
        raise ValueError(f"train.sampler: {error}") from error
    if not isinstance(sampler, Sampler):
        raise ValueError(f"train.sampler: {cls.__name__} must subclass trlx.sampling.base.Sampler")
    return sampler
