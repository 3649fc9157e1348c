"""Chats: lists of messages as the tokenizer's chat template writes them, and which of their tokens to learn from."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant", "tool"),
    "assistant": ("system", "developer", "user", "tool"),
    "tool": ("assistant", "tool"),
}
"""The roles, and after which others each may speak; None is the beginning."""


def is_chat(content: Any) -> bool:
    """Whether a prompt or sample is meant as a list of messages, ``[{"role": "user", "content": "Hi"}, ...]``."""
    return isinstance(content, (list, tuple)) and any(isinstance(message, Mapping) for message in content)


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a chat up to where the assistant answers, special tokens being those of the template alone.

    Args:
        name: what to call the chat in an error, e.g. ``"Prompt 3"``.

    Raises:
        ValueError, TypeError: there is no chat template, it refuses the chat, a message is wrong, or the last one is
            the assistant's.
    """
    messages = _checked(messages, name)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{name} ends with a message of the assistant, so there is nothing to answer: leave it out")
    text = _text(messages, tokenizer, name, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[int], list[bool]]:
    """(token ids, which of them to train on) of a chat that ends with the assistant's last turn.

    Trained are all turns of the assistant, each with the special token that ends it, as the model must learn to stop.
    What the template writes after that one (a line break) is not. Where it ends no turn by a special token, one eos
    follows the last turn. Turns are what the template encloses in ``{% generation %}``; without such marks, what a
    message adds to the chat before it with the generation prompt.

    Args:
        name: what to call the chat in an error, e.g. ``"Sample 3"``.

    Raises:
        ValueError, TypeError: there is no chat template, it refuses the chat or does not show where a turn begins, a
            message is wrong, or the last one is not the assistant's.
    """
    messages = _checked(messages, name)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with a message of {messages[-1]['role']}; what is learned is the assistant's")
    if not tokenizer.is_fast:
        raise ValueError("To find the turns of a chat trlx needs a fast tokenizer; this one is a slow one")
    text, spans = _rendered(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, begins = encoded["input_ids"], _begins(encoded["offset_mapping"])
    turns = [(bisect_left(begins, start), bisect_left(begins, stop)) for start, stop in spans]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # after the last turn no header of a next one can follow, so a special token there is the one that ends turns
    closing = {tokenizer.eos_token_id, *ids[turns[-1][1] : turns[-1][1] + 1]} & special
    trained = [False] * len(ids)
    for first, last in turns:
        end = _end(ids, first, last, tokenizer, special, closing)
        trained[first:end] = [True] * (end - first)
    ids, trained = ids[:end], trained[:end]
    return (ids, trained) if ids[-1] in special else ([*ids, tokenizer.eos_token_id], [*trained, True])


def _rendered(messages: list[dict], tokenizer, name: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and from which character to which each turn of the assistant goes."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", _template(tokenizer)):
        return _compared(messages, tokenizer, name)
    try:
        # apply_chat_template can return a mask, but over tokens, and where a turn ends with white space that belongs
        # to no token (tokenizers that trim offsets), its mask runs on to the end of the chat
        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise _refusal(name, error) from error
    if not spans:
        raise ValueError(
            f"{name}: the chat template has {{% generation %}} marks, but not around the assistant's turns"
        )
    return text, spans


def _compared(messages: list[dict], tokenizer, name: str) -> tuple[str, list[tuple[int, int]]]:
    """The same for templates without marks, by comparing the chat with its own beginnings."""
    text, spans = _text(messages, tokenizer, name), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _text(messages[:index], tokenizer, name, add_generation_prompt=True)
        turn = _text(messages[: index + 1], tokenizer, name)
        if not (text.startswith(turn) and turn.startswith(before)):
            raise ValueError(
                f"{name}: the chat template writes what comes before message {index} differently once it is there, "
                "so the turn's beginning cannot be found: enclose the assistant's turns in tokenizer.chat_template "
                "with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), len(turn)))
    return text, spans


def _text(messages: list[dict], tokenizer, name: str, add_generation_prompt: bool = False) -> str:
    _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise _refusal(name, error) from error


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, which prompts or samples that are lists of messages need: set "
            "tokenizer.chat_template, or write them as texts"
        )
    return tokenizer.get_chat_template()


def _refusal(name: str, error: TemplateError) -> ValueError:
    return ValueError(f"{name}: the chat template refuses it: {error}")


def _begins(offsets: list[tuple[int, int]]) -> list[int]:
    """The character at which each token begins, in ascending order."""
    begins, reached = [], 0
    for start, stop in offsets:
        # tokenizers that trim offsets leave no width to white space and put it at its own end
        begins.append(start if stop > start else min(start, reached))
        reached = max(reached, stop)
    return begins


def _end(ids: list[int], first: int, last: int, tokenizer, special: set[int], closing: set[int]) -> int:
    """Where the turn that covers tokens [first, last) ends, with the token that ends it and nothing after that one."""
    end = last
    while end > first and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    if end > first and ids[end - 1] in special:
        return end
    return last + 1 if ids[last : last + 1] and ids[last] in closing else last


def _checked(messages: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """The messages without empty keys, which data sets fill with None and templates would write out."""
    kept: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"{name}, message {index} must be a dict with role and content, got {repr(message)[:80]}")
        kept.append({key: value for key, value in message.items() if value is not None})
        _check(f"{name}, message {index}", kept[-1], kept[-2]["role"] if index else None)
    return kept


def _check(where: str, message: dict[str, Any], previous: str | None) -> None:
    role = message.get("role")
    if "role" not in message or not ("content" in message or "tool_calls" in message):
        raise ValueError(f'{where} must have "role" and "content"; it has {sorted(map(str, message))}')
    if role not in FOLLOWS:
        raise ValueError(f"{where} has the role {role!r}; known: {', '.join(FOLLOWS)}")
    if not isinstance(message.get("content", ""), str):
        raise TypeError(f"{where}: content must be a text, got {repr(message['content'])[:80]}")
    if previous not in FOLLOWS[role]:
        place = "at the beginning" if previous is None else f"after one of {previous}"
        raise ValueError(f"{where}: a message of {role} cannot stand {place}")
