"""Calls the user's functions, each with only the keywords that it accepts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx.batch import Rollout
from trlx.data.prompts import RESERVED
from trlx.strict import suggestion

OFFERED = (*RESERVED, "prompt_ids", "output_ids", "ended", "step", "messages")
"""What a function may ask for beside the keys of the prompts. A key with one of these names comes instead of it."""

BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


ELSEWHERE = {"completions": "outputs", "completion_ids": "output_ids"}
"""Arguments of TRL's reward functions, and their names here."""


class RewardError(RuntimeError):
    """reward_fn or metric_fn failed, took too long, or returned something wrong."""


class Arguments:
    """What reward_fn and metric_fn may ask about a batch of rollouts.

    `offered` has it by the names of `OFFERED`, and `metadata` has the other keys of the prompts, one entry per sample.
    Texts have no special tokens, and token ids are copies. A sample is prompt, `separator`, output. With
    `eos_in_outputs` the eos text follows each output whose response ended, as in CarperAI's rollouts.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        tokenizer: PreTrainedTokenizerBase,
        step: int = 0,
        separator: str = "",
        eos_in_outputs: bool = False,
    ):
        prompts = tokenizer.batch_decode([rollout.prompt for rollout in rollouts], skip_special_tokens=True)
        outputs = tokenizer.batch_decode([rollout.response for rollout in rollouts], skip_special_tokens=True)
        ended = [rollout.ended for rollout in rollouts]
        if eos_in_outputs:
            outputs = [text + tokenizer.eos_token * ends for text, ends in zip(outputs, ended, strict=True)]
        self.rollouts = rollouts
        self.offered: dict[str, Any] = {
            "samples": [prompt + separator + output for prompt, output in zip(prompts, outputs, strict=True)],
            "prompts": prompts,
            "outputs": outputs,
            "tokenizer": tokenizer,
            "prompt_ids": [list(rollout.prompt) for rollout in rollouts],
            "output_ids": [list(rollout.response) for rollout in rollouts],
            "ended": ended,
            "step": step,
            "messages": [rollout.messages for rollout in rollouts],
        }
        self.metadata = {key: [rollout.metadata[key] for rollout in rollouts] for key in rollouts[0].metadata}


class UserFunction:
    """reward_fn or metric_fn, called with the arguments that its signature names.

    If it has ``**kwargs``, these get `unasked` and all metadata. A function whose signature Python cannot read (some
    builtins) is called as if it had only ``**kwargs``. Errors call it `name`.
    """

    def __init__(self, name: str, fn: Callable[..., Any], unasked: Sequence[str]):
        if not callable(fn):
            hint = f": for a classifier write trlx.SequenceClassifierReward({fn!r})" if isinstance(fn, str) else ""
            raise TypeError(f"{name} must be a function, got {repr(fn)[:80]}{hint}")
        if inspect.isclass(fn) and "__call__" in dir(fn):  # its objects are functions
            raise TypeError(f"{name} must be a function, got the class {fn.__name__}: write {fn.__name__}()")
        self.name = name
        self.fn = fn
        self.unasked = unasked
        self.named, self.required, self.takes_any = _signature(fn)

    def check(self, metadata: Iterable[str]) -> None:
        """Raises a ValueError if the function requires an argument that neither trlx nor `metadata` provides."""
        provided = [*OFFERED, *metadata]
        for name in self.required:
            if name not in provided:
                near = suggestion(ELSEWHERE.get(name, name), provided)
                raise ValueError(
                    f"{self.name} asks for {name!r}, which nothing provides.{near} There are "
                    f"{', '.join(map(str, provided))}: rename the argument, give it a default, or give every prompt a "
                    f"key {name!r}"
                )

    def __call__(self, arguments: Arguments) -> Any:
        """What the function returns; a RewardError with the cause if it raises."""
        everything = {**arguments.offered, **arguments.metadata}
        asked = {*self.named, *self.unasked, *arguments.metadata} if self.takes_any else self.named
        with self._reported(arguments):
            return self.fn(**{name: value for name, value in everything.items() if name in asked})

    async def finish(self, returned: Any, arguments: Arguments) -> Any:
        """What the function returned, awaited if it is ``async``; raises as `__call__`."""
        with self._reported(arguments):
            return await returned if inspect.isawaitable(returned) else returned

    @contextmanager
    def _reported(self, arguments: Arguments) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = short(arguments.offered["samples"][0])
            raise RewardError(f"{self.name} raised {type(error).__name__}: {error}; first sample: {first}") from error


def call_all(functions: Sequence[UserFunction], arguments: Arguments, runner: asyncio.Runner) -> list[Any]:
    """What the functions return. Plain ones run one after the other, then all ``async`` ones run at the same time."""
    # not inside the loop, because a plain function may start a loop of its own
    returned = [function(arguments) for function in functions]
    if not any(map(inspect.isawaitable, returned)):
        return returned

    async def together() -> list[asyncio.Task]:
        async with asyncio.TaskGroup() as group:  # if one fails, the others are cancelled
            pairs = zip(functions, returned, strict=True)
            return [group.create_task(function.finish(one, arguments)) for function, one in pairs]

    try:
        return [task.result() for task in runner.run(together())]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__


def short(sample: str) -> str:
    """A sample as errors show it, without its middle if it is long."""
    text = repr(sample)
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _signature(fn: Callable[..., Any]) -> tuple[set[str], list[str], bool]:
    """(the arguments that it names, those of them without a default, whether it takes any other)."""
    try:
        own = inspect.signature(fn, follow_wrapped=False).parameters.values()
        inner = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return set(), [], True
    # a wrapper with **kwargs (functools.wraps, torch.no_grad) passes them on to the function inside
    last = inner if any(p.kind is p.VAR_KEYWORD for p in own) else own
    named = {p.name for p in (*own, *last) if p.kind in BY_KEYWORD}
    required = [p.name for p in own if p.kind in BY_KEYWORD and p.default is p.empty]
    return named, required, any(p.kind is p.VAR_KEYWORD for p in last)
