"""How the user's functions are called: what they are offered, and that each gets only the keywords it accepts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout
from trlx.data.prompts import RESERVED
from trlx.strict import suggestion

OFFERED = (*RESERVED, "prompt_ids", "output_ids", "ended", "step", "messages")
"""What a function may ask for beside the keys of prompts; a key that has one of these names goes first."""


class RewardError(RuntimeError):
    """reward_fn or metric_fn failed, took too long, or returned something else than one entry per sample."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What reward_fn and metric_fn may ask about a batch of rollouts."""

    offered: dict[str, Any]
    """By the names of `OFFERED`."""
    metadata: dict[str, list[Any]]
    """The further keys of the prompts, one entry per sample."""

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        tokenizer: PreTrainedTokenizerBase,
        step: int = 0,
        separator: str = "",
        eos_in_outputs: bool = False,
    ) -> Arguments:
        """Texts and the rest; token ids are copies. See `decode` for `separator` and `eos_in_outputs`."""
        samples, prompts, outputs = decode(rollouts, tokenizer, separator, eos_in_outputs)
        offered = {
            "samples": samples,
            "prompts": prompts,
            "outputs": outputs,
            "tokenizer": tokenizer,
            "prompt_ids": [list(rollout.prompt) for rollout in rollouts],
            "output_ids": [list(rollout.response) for rollout in rollouts],
            "ended": [rollout.ended for rollout in rollouts],
            "step": step,
            "messages": [rollout.messages for rollout in rollouts],
        }
        return cls(offered, {key: [r.metadata[key] for r in rollouts] for key in rollouts[0].metadata})


def decode(
    rollouts: Sequence[Rollout],
    tokenizer: PreTrainedTokenizerBase,
    separator: str = "",
    eos_in_outputs: bool = False,
) -> tuple[list[str], list[str], list[str]]:
    """(samples, prompts, outputs): texts without special tokens. A sample is prompt, `separator`, output.

    With `eos_in_outputs` the eos text follows an output whose response ended by itself, as in the original's rollouts.
    """
    prompts = tokenizer.batch_decode([rollout.prompt for rollout in rollouts], skip_special_tokens=True)
    outputs = tokenizer.batch_decode([rollout.response for rollout in rollouts], skip_special_tokens=True)
    if eos_in_outputs:
        pairs = zip(outputs, rollouts, strict=True)
        outputs = [output + tokenizer.eos_token if rollout.ended else output for output, rollout in pairs]
    samples = [prompt + separator + output for prompt, output in zip(prompts, outputs, strict=True)]
    return samples, prompts, outputs


class UserFunction:
    """reward_fn or metric_fn, called with the keywords that it accepts.

    It gets what its signature names, of all that there is; its ``**kwargs`` get `unasked` and metadata. So does a
    function whose signature Python cannot tell (some builtins).

    Args:
        name: what errors call it, e.g. ``"reward_fn"``.

    Raises:
        TypeError: `fn` cannot be called.
    """

    def __init__(self, name: str, fn: Callable[..., Any], unasked: Sequence[str]):
        if not callable(fn):
            raise TypeError(f"{name} must be a function, got {repr(fn)[:80]}")
        self.name = name
        self.fn = fn
        self.unasked = unasked
        self.named, self.required, self.takes_any = _signature(fn)

    def check(self, metadata: Iterable[str]) -> None:
        """Whether there is all that the function requires, where prompts have these keys.

        Raises:
            ValueError: something is not there; the message names it, and what is.
        """
        provided = [*OFFERED, *metadata]
        for name in self.required:
            if name not in provided:
                raise ValueError(
                    f"{self.name} asks for {name!r}, which nothing provides.{suggestion(name, provided)} There are "
                    f"{', '.join(map(str, provided))}: rename the argument, give it a default, or give every prompt a "
                    f"key {name!r}"
                )

    def __call__(self, arguments: Arguments) -> Any:
        """What the function returns.

        Raises:
            RewardError: it raised, which is the cause.
        """
        everything = {**arguments.offered, **arguments.metadata}
        asked = {*self.named, *self.unasked, *arguments.metadata} if self.takes_any else self.named
        with self._blamed(arguments):
            return self.fn(**{name: value for name, value in everything.items() if name in asked})

    async def finish(self, returned: Any, arguments: Arguments) -> Any:
        """What the function returns in the end, if it is ``async``."""
        with self._blamed(arguments):
            return await returned if inspect.isawaitable(returned) else returned

    @contextmanager
    def _blamed(self, arguments: Arguments) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = short(arguments.offered["samples"][0])
            raise RewardError(f"{self.name} raised {type(error).__name__}: {error}; first sample: {first}") from error


def call_all(functions: Sequence[UserFunction], arguments: Arguments, runner: asyncio.Runner) -> list[Any]:
    """What the functions return, called one after the other; those that are ``async`` then run at the same time.

    Raises:
        RewardError: one of them raised.
    """
    # outside the loop, for a plain function may start one of its own
    returned = [function(arguments) for function in functions]
    if not any(map(inspect.isawaitable, returned)):
        return returned

    async def together() -> list[Any]:
        pairs = zip(functions, returned, strict=True)
        tasks = [asyncio.ensure_future(function.finish(one, arguments)) for function, one in pairs]
        try:
            return await asyncio.gather(*tasks)
        finally:  # if one fails, the others need not go on
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return runner.run(together())


def short(sample: str, width: int = 300) -> str:
    """A sample as errors show it."""
    text = repr(sample)
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"


def _signature(fn: Callable[..., Any]) -> tuple[set[str], list[str], bool]:
    """(the arguments it names, those of them without a default, whether it takes any other).

    A wrapper that passes on what it gets (``functools.wraps``, ``torch.no_grad``) takes what the wrapped function does.
    """
    try:
        own, wrapped = inspect.signature(fn, follow_wrapped=False), inspect.signature(fn)
    except (TypeError, ValueError):
        return set(), [], True
    named, takes_any = _keywords(own)
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    if takes_any:
        inner, takes_any = _keywords(wrapped)
        named = {**inner, **named}
    return set(named), required, takes_any


def _keywords(signature: inspect.Signature) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that a keyword can fill, and whether there is ``**kwargs``."""
    parameters = signature.parameters
    by_name = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_name, any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
