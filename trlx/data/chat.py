"""Chats: lists of messages that the tokenizer's chat template writes as text, and which of their tokens to train on."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
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
"""For each role, the roles that the message before it may have; None: it may be the first message."""

SHAREGPT = ': write "role" for "from", "content" for "value", and the roles user for human and assistant for gpt'


def is_chat(content: Any) -> bool:
    """Whether a prompt or sample is a list of messages, ``[{"role": "user", "content": "Hi"}, ...]``."""
    return isinstance(content, (list, tuple)) and any(isinstance(message, Mapping) for message in content)


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """The token ids of a chat up to the place where the assistant answers; only the template adds special tokens.

    Raises a ValueError or TypeError, which calls the chat `name`, if there is no chat template, if it refuses the chat,
    or if a message is wrong or stands in a wrong place.
    """
    messages = _checked(messages, tokenizer, name)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{name} ends with a message of the assistant, so there is nothing to answer: leave it out")
    text = _text(messages, tokenizer, name, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, context: int = 0
) -> tuple[list[int], list[bool]]:
    """(token ids, which of them to train on) of a chat that ends with the assistant's last turn.

    All turns of the assistant but those among the first `context` messages are trained, each with the special token
    that ends it: the model must learn to stop. What the template writes after the last of these tokens (a line break)
    is left out. If the template ends turns without a special token, one eos follows the last turn. A turn is what the
    template encloses in ``{% generation %}``. Without these marks it is what the message adds to the text of the
    messages before it with the generation prompt.

    Raises errors as `chat_prompt`, and a ValueError if trlx cannot find where a turn begins.
    """
    messages = _checked(messages, tokenizer, name)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{name} ends with a message of {messages[-1]['role']}, but must end with one of assistant")
    if not tokenizer.is_fast:
        raise ValueError("trlx needs a fast tokenizer to find the turns of a chat, and this tokenizer is a slow one")
    find_turns = _marked if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) else _compared
    text, spans = find_turns(messages, tokenizer, name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, begins = encoded["input_ids"], _begins(encoded["offset_mapping"])
    turns = [(bisect_left(begins, start), bisect_left(begins, stop)) for start, stop in spans]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # no header follows the last turn, so a special token right after it is the one that ends turns
    closing = {tokenizer.eos_token_id, *ids[turns[-1][1] : turns[-1][1] + 1]} & special
    trained = [False] * len(ids)
    for first, last in turns[sum(message["role"] == "assistant" for message in messages[:context]) :]:
        end = _end(ids, first, last, tokenizer, special, closing)
        trained[first:end] = [True] * (end - first)
    ids, trained = ids[:end], trained[:end]
    return (ids, trained) if ids[-1] in special else ([*ids, tokenizer.eos_token_id], [*trained, True])


def _marked(messages: list[dict], tokenizer, name: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat and the (first, end) characters of each turn of the assistant, from the template's marks."""
    # not apply_chat_template: after a turn that ends with white space, its mask over tokens may run on to the end
    how = {"conversations": [messages], "chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    (text,), (spans,) = _rendered(name, render_jinja_template, return_assistant_tokens_mask=True, **how)
    if not spans:
        raise ValueError(f"{name}: the chat template's {{% generation %}} marks do not enclose the assistant's turns")
    return text, spans


def _compared(messages: list[dict], tokenizer, name: str) -> tuple[str, list[tuple[int, int]]]:
    """As `_marked` for templates without marks: compares the text of the chat with those of its beginnings."""
    text, spans = _text(messages, tokenizer, name), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _text(messages[:index], tokenizer, name, add_generation_prompt=True)
        turn = _text(messages[: index + 1], tokenizer, name)
        if not (text.startswith(turn) and turn.startswith(before)):
            raise ValueError(
                f"{name}: the chat template writes the messages before message {index} differently when that message "
                "follows, so trlx cannot find where the turn begins: enclose the assistant's turns in "
                "tokenizer.chat_template with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), len(turn)))
    return text, spans


def _text(messages: list[dict], tokenizer, name: str, add_generation_prompt: bool = False) -> str:
    how = {"conversation": messages, "add_generation_prompt": add_generation_prompt, "tokenize": False}
    return _rendered(name, tokenizer.apply_chat_template, **how)


def _rendered(name: str, render: Callable[..., Any], **how: Any) -> Any:
    try:
        return render(**how)
    except TemplateError as error:
        raise ValueError(f"{name}: the chat template refuses it: {error}") from error


def _begins(offsets: list[tuple[int, int]]) -> list[int]:
    """The character at which each token begins, in ascending order."""
    begins, reached = [], 0
    for start, stop in offsets:
        # tokenizers that trim offsets give tokens of white space no width and put them at the end of the white space
        begins.append(start if stop > start else min(start, reached))
        reached = max(reached, stop)
    return begins


def _end(ids: list[int], first: int, last: int, tokenizer, special: set[int], closing: set[int]) -> int:
    """The end of the turn of tokens [first, last): after the special token that ends it, if there is one."""
    end = last
    while end > first and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    if end > first and ids[end - 1] in special:
        return end
    return last + 1 if ids[last : last + 1] and ids[last] in closing else last


def _checked(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, name: str) -> list[dict[str, Any]]:
    """The messages without keys whose value is None: data sets add them, and templates would write them out."""
    if tokenizer.chat_template is None:
        advice = "set tokenizer.chat_template, or write prompts and samples as texts"
        raise ValueError(f"{name} is a list of messages, but the tokenizer has no chat template: {advice}")
    kept: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        where, previous = f"{name}, message {index}", kept[-1]["role"] if kept else None
        message = check_keys(message, where)
        role, content = message["role"], message.get("content", "")
        if role not in FOLLOWS:
            raise ValueError(f"{where} has the role {role!r}; known: {', '.join(FOLLOWS)}")
        if not isinstance(content, str):
            raise TypeError(f"{where}: content must be a text, got {repr(content)[:80]}")
        if previous not in FOLLOWS[role]:
            place = f"after one of {previous}" if previous else "at the beginning"
            raise ValueError(f"{where}: a message of {role} cannot stand {place}")
        kept.append(message)
    return kept


def check_keys(message: Any, where: str) -> dict[str, Any]:
    """The message without keys whose value is None. Raises an error about `where` if it has no role or no content."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with role and content, got {repr(message)[:80]}")
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message or not message.keys() & {"content", "tool_calls"}:
        found = f"{sorted(map(str, message))}{SHAREGPT if {'from', 'value'} <= message.keys() else ''}"
        raise ValueError(f'{where} must have "role" and "content"; it has {found}')
    return message
