"""How responses are sampled: checked generation settings, and the sweep over one of them at evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trlx.batch import Rollout, Sample
from trlx.data.prompts import Prompt
from trlx.sampling.stopping import Stopper
from trlx.strict import called_here, suggestion

LISTS = (
    "eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens forced_eos_token_id sequence_bias logit_mask"
).split()
"""Settings whose value may be a list: such a list is no sweep."""

BACKEND_DECIDES = ("use_cache", "synced_gpus")
"""Arguments of ``generate`` in old configs that do not change the samples; they are ignored."""

SHAPING = ("beta", "logit_mask")
"""Settings of trlx that ``transformers`` does not have."""

GEN_KWARGS = "method.gen_kwargs"
"""The key of the settings in a config, for messages."""

DIVERGED = (
    "The model's log-probabilities are not finite: its weights have diverged (lower optimizer.kwargs.lr), or fp16 "
    "has no numbers as large as it needs (write train.mixed_precision: bf16)"
)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Settings of one call of `Sampler.generate`. Example: ``SamplingConfig(max_new_tokens=8, eos_token_id=2)``."""

    max_new_tokens: int = 40
    min_new_tokens: int = 0
    do_sample: bool = True
    """False: always the likeliest token."""
    temperature: float = 1.0
    """Above 0; logits are divided by it."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that reach this probability together."""
    eos_token_id: int | list[int] | None = None
    pad_token_id: int = 0
    stop: Stopper | None = None
    """Finds the stop sequences."""
    where: str = field(default=GEN_KWARGS, compare=False)
    """The key of these settings in the config, for messages."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All other settings as given, e.g. ``{"repetition_penalty": 1.2}``, or ``{"beta": 1}`` for ILQL."""

    @classmethod
    def from_kwargs(
        cls,
        gen_kwargs: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        stop: Stopper | None = None,
        where: str = GEN_KWARGS,
    ) -> SamplingConfig:
        """Settings from a config's ``gen_kwargs``. None stands for the default, temperature 0 for ``do_sample: false``.

        Raises:
            ValueError: a setting is unknown, not supported or out of range, max_new_tokens is missing, or a list stands
                where one value is needed.
        """
        _check_names(gen_kwargs, where)
        given = {name: value for name, value in gen_kwargs.items() if value is not None and name not in BACKEND_DECIDES}
        name, values = sweep(given, where)
        if name is not None:
            raise ValueError(
                f"{where}.{name} is the list {values}, but only evaluations sweep over values: write one value, e.g. "
                f"{name}={values[-1]!r} in trainer.generate(...), or for rollouts method.gen_experience_kwargs.{name}"
            )
        if "max_new_tokens" not in given:
            raise ValueError(f"{where}.max_new_tokens is missing: write how many tokens a response may have, e.g. 40")
        given = _checked(given, where)
        own = {name: given.pop(name) for name in _OWN & given.keys()}
        tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return cls(**tokens | own, stop=stop, where=where, extra=given)

    def check_shaping(self, has_q: bool, vocab_size: int) -> None:
        """Checks `SHAPING` for a model with `vocab_size` tokens, with or without Q heads.

        Raises:
            ValueError: beta without Q heads, or a mask that is not [V, V].
        """
        beta, mask = self.extra.get("beta"), self.extra.get("logit_mask")
        if beta is not None and not has_q:
            raise ValueError(
                f"{self.where}.beta is {beta}, but only ILQL has the Q heads that sampling with beta needs: remove beta"
            )
        if mask is not None and _shape(mask) != [vocab_size, vocab_size]:
            raise ValueError(
                f"logit_mask has the shape {_shape(mask)}, but the model has {vocab_size} tokens: make it "
                f"[{vocab_size}, {vocab_size}], True where the token of the column must not follow that of the row"
            )

    @property
    def eos_token_ids(self) -> list[int]:
        """Every token that ends a response."""
        given = [] if self.eos_token_id is None else self.eos_token_id
        return list(given) if isinstance(given, (list, tuple)) else [given]

    def rollout(self, prompt: Prompt, sample: Sample, group: int = 0) -> Rollout:
        """The rollout of a sample, without a score. An eos replaces its stop sequence."""
        ids, was_cut = self.stop.finish(sample.ids) if self.stop else (sample.ids, False)
        drawn = len(ids) - was_cut  # the eos that replaces a stop sequence was not drawn
        return Rollout(
            prompt.ids,
            ids,
            metadata=prompt.metadata,
            messages=prompt.messages,
            ended=was_cut or (len(ids) > 0 and ids[-1] in self.eos_token_ids),
            group=group,
            logprobs=None if sample.logprobs is None else sample.logprobs[:drawn],
            values=None if sample.values is None else sample.values[:drawn],
            version=sample.version,
        )

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which log-probabilities are taken: that of sampling, or 1 for ``do_sample: false``."""
        return float(self.temperature) if self.do_sample else 1.0


def sweep(gen_kwargs: Mapping[str, Any], where: str = GEN_KWARGS) -> tuple[str | None, list[Any]]:
    """(the one setting whose value is a list, its values), or (None, []).

    Raises:
        ValueError: more than one setting has a list, or the list is empty.
    """
    swept = [name for name, value in gen_kwargs.items() if isinstance(value, (list, tuple)) and name not in LISTS]
    if len(swept) > 1:
        raise ValueError(f"{where} sweeps over {' and '.join(swept)}: give only one setting a list of values")
    if not swept:
        return None, []
    if not len(gen_kwargs[swept[0]]):
        raise ValueError(f"{where}.{swept[0]} is an empty list: write a value, or several to compare in evaluations")
    return swept[0], list(gen_kwargs[swept[0]])


def sweep_variants(gen_kwargs: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(suffix of metric names, gen_kwargs) for each value of the sweep: ``[("@beta=0", {...}), ("@beta=1", {...})]``;
    without a sweep ``[("", gen_kwargs)]``."""
    name, values = sweep(gen_kwargs)
    if name is None:
        return [("", dict(gen_kwargs))]
    return [(f"@{name}={value}", {**gen_kwargs, name: value}) for value in values]


def check_rollouts(gen_kwargs: Mapping[str, Any], key: str) -> None:
    """Checks that rollouts are drawn at random from the policy, as their method assumes.

    Args:
        key: the key of `gen_kwargs` in the config, for the message.

    Raises:
        ValueError: they ask for the likeliest tokens, or for beam search.
    """
    advice = "remove it, or with PPO keep it for evaluations and write method.gen_experience_kwargs for rollouts"
    if gen_kwargs.get("do_sample") is False or gen_kwargs.get("temperature") == 0:
        raise ValueError(
            f"{key} asks for the likeliest token always (do_sample: false or temperature: 0), so every rollout of a "
            f"prompt would be the same: {advice}"
        )
    if gen_kwargs.get("num_beams", 1) not in (1, None):
        raise ValueError(f"{key}.num_beams searches for likely responses, but rollouts must be drawn: {advice}")


def check_logits(logits: Tensor) -> None:
    """Checks that a token can be drawn from every row of the model's `logits` [..., V].

    Raises:
        FloatingPointError: the largest logit of a row is not finite.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise FloatingPointError(DIVERGED)


def cut_at_eos(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """`ids` up to the first of `eos_ids`, which is included; all of `ids` if there is none."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return list(ids[:end])


_REFUSED = {
    "num_return_sequences": (
        "every prompt gets one response: repeat the prompts, or for RFT set method.n_generations_per_prompt"
    ),
    "stop_strings": "pass trlx.train(stop_sequences=[...]) instead",
    **dict.fromkeys(
        (*GenerationConfig.extra_output_flags, "return_dict_in_generate"), "trlx reads only the tokens: remove it"
    ),
    **dict.fromkeys(
        "num_beam_groups diversity_penalty penalty_alpha dola_layers constraints force_words_ids".split(),
        "transformers no longer has this way of decoding: remove it",
    ),
}
"""Settings of transformers that are not supported, and what to do instead."""


_OWN = {f.name for f in fields(SamplingConfig)} - {"stop", "extra", "where"}


def _check_names(gen_kwargs: Mapping[str, Any], where: str) -> None:
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    known = _OWN | theirs | {*SHAPING, *BACKEND_DECIDES}
    for name, value in gen_kwargs.items():
        if name not in known:
            here = called_here(f"{GEN_KWARGS}.{name}")
            near = f" Write {here} instead." if here else suggestion(name, known)
            raise ValueError(
                f"Unknown key '{where}.{name}'.{near} Known are the settings of transformers' GenerationConfig, "
                f"{' and '.join(SHAPING)}"
            )
        if name in _REFUSED and (value is True or value not in (None, False, 1)):
            raise ValueError(f"{where}.{name} is {value!r}, but {_REFUSED[name]}")


def _shape(mask: Any) -> list[int] | str:
    try:
        return list(torch.as_tensor(mask).shape)
    except (TypeError, ValueError, RuntimeError):
        return f"of no table ({repr(mask)[:40]})"


def _checked(given: dict[str, Any], where: str) -> dict[str, Any]:
    least = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0}
    for name in [name for name in (*least, "temperature", "top_p") if name in given]:
        value = given[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where}.{name} must be a number, got {value!r}")
        if name in least:
            if value < least[name] or value % 1:
                raise ValueError(f"{where}.{name} must be a whole number of at least {least[name]}, got {value!r}")
            given[name] = int(value)
    if given.get("temperature") == 0:
        given |= {"temperature": 1.0, "do_sample": False}
    if given.get("temperature", 1.0) < 0:
        raise ValueError(f"{where}.temperature must be 0 (greedy) or more, got {given['temperature']}")
    if not 0 < given.get("top_p", 1.0) <= 1:
        raise ValueError(f"{where}.top_p must be above 0 and at most 1, got {given['top_p']}")
    return given
