"""Prompts: tokenized once, then drawn in an endless shuffled order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.data.chat import chat_prompt, is_chat
from trlx.data.rows import as_list
from trlx.data.store import permutation
from trlx.data.tokenizer import beginning, begins_with, prompt_tokens, shorten
from trlx.registry import register_datapipeline

logger = logging.get_logger(__name__)

RESERVED = ("samples", "prompts", "outputs", "tokenizer")
"""Arguments of reward_fn that a key of a prompt cannot be called."""


@dataclass(slots=True)
class Prompt:
    """One tokenized prompt. Example: ``Prompt(ids=[7, 8], text="Hi", metadata={"label": 1})``."""

    ids: list[int]
    text: str | None = None
    """As the caller wrote it; None for token ids and chats."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The other keys of the caller's dict; reward_fn and metric_fn get each as a list with one entry per sample."""
    messages: list[Any] | None = None
    """The chat as the caller wrote it; None for texts and token ids."""


@register_datapipeline
class PromptPipeline:
    """Prompts of at most `max_prompt_length` tokens, ready to sample from.

    A prompt is a text (see `prompt_tokens`), a list of token ids, a chat (see `chat_prompt`), or a dict that has one of
    these as "prompt" and any other keys, the same in all dicts; trlx does not change the dicts. Longer prompts are cut
    on the tokenizer's truncation side, with one warning for all. Chats are always cut on the left, as their end asks
    the assistant to answer. A bos in front stays. `add_special_tokens` adds all special tokens of the tokenizer, as
    encoder-decoder models need them. Raises a ValueError or TypeError if there are no prompts, or if one has no tokens,
    a wrong type or other keys than the first.
    """

    def __init__(
        self,
        prompts: Iterable[str | list[int] | list[Mapping[str, Any]] | Mapping[str, Any]],
        max_prompt_length: int,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool = False,
    ):
        if max_prompt_length < 1:
            raise ValueError("There is no room for a prompt: make train.seq_length larger than max_new_tokens")
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.add_special_tokens = add_special_tokens
        rows = _rows(prompts)
        self.prompts = [
            Prompt(
                ids,
                text=row["prompt"] if isinstance(row["prompt"], str) else None,
                metadata={key: value for key, value in row.items() if key != "prompt"},
                messages=list(row["prompt"]) if is_chat(row["prompt"]) else None,
            )
            for row, ids in zip(rows, self._tokenized([row["prompt"] for row in rows]), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def create_loader(self, *_: Any, **__: Any) -> None:
        """Raises a NotImplementedError; CarperAI's trlx read prompts from the loader that this returned."""
        raise NotImplementedError("A PromptPipeline has no loader: read prompts as pipeline[i], or from a PromptStream")

    def digest(self) -> str:
        """A short hash of tokens and metadata. If a resumed run has another one, its prompts changed."""
        # the repr of an object may hold its address, which differs between runs
        rows = re.sub(r" at 0x[0-9a-fA-F]+", "", "".join(f"{prompt.ids}{prompt.metadata}" for prompt in self.prompts))
        return hashlib.sha256(rows.encode(errors="replace")).hexdigest()[:16]

    def _tokenized(self, contents: list[Any]) -> list[list[int]]:
        texts = [content for content in contents if isinstance(content, str)]
        ids_of_texts = iter(prompt_tokens(texts, self.tokenizer, self.add_special_tokens))
        start, limit = beginning(self.tokenizer), self.max_prompt_length
        found, sides = [], []
        for index, content in enumerate(contents):
            side = self.tokenizer.truncation_side
            if is_chat(content):
                ids, side = chat_prompt(content, self.tokenizer, f"Prompt {index}"), "left"
            else:
                ids = next(ids_of_texts) if isinstance(content, str) else list(content)
            if not ids:
                bos = self.tokenizer.bos_token or self.tokenizer.eos_token
                raise ValueError(f"Prompt {index} has no tokens, so the model cannot start: write at least {bos!r}")
            if len(ids) > limit:
                sides.append(side)
                if self.add_special_tokens and isinstance(content, str):  # special tokens at the end must stay, too
                    ids = self.tokenizer(content, truncation=True, max_length=limit)["input_ids"]
                else:
                    ids = shorten(ids, limit, side, begins_with(ids, start))
            found.append(ids)
        if sides:
            logger.warning(
                f"{len(sides)} of {len(found)} prompts were longer than {limit} tokens (train.seq_length less the "
                f"max_new_tokens of generation) and were cut on the {' or '.join(sorted(set(sides)))}"
            )
        return found


class PromptStream:
    """An endless sequence of a pipeline's prompts, in a new shuffled order for every pass.

    The order depends on the seed alone; `position`, the number of prompts drawn so far, is the whole state.
    """

    def __init__(self, pipeline: PromptPipeline, seed: int):
        self.pipeline = pipeline
        self.seed = seed
        self.position = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        prompts = self.peek(count)
        self.position += count
        return prompts

    def peek(self, count: int) -> list[Prompt]:
        """The prompts that `take` will return."""
        size = len(self.pipeline)
        places = [divmod(position, size) for position in range(self.position, self.position + count)]
        return [self.pipeline[permutation(size, self.seed, "prompts", number)[offset]] for number, offset in places]


def _rows(prompts: Iterable[Any]) -> list[Mapping[str, Any]]:
    """The prompts as dicts, checked."""
    rows = [row if isinstance(row, Mapping) else {"prompt": row} for row in as_list(prompts, "prompts")]
    if not rows:
        raise ValueError("The list of prompts is empty: pass at least one prompt")
    for index, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f'Prompt {index} is a dict without the key "prompt"; it has {sorted(map(str, row))}')
        if row.keys() != rows[0].keys():
            both = f"{sorted(map(str, row))}, prompt 0 has {sorted(map(str, rows[0]))}"
            raise ValueError(f"Prompt {index} has the keys {both}: give every prompt the same keys")
        for key in row.keys() & {*RESERVED}:
            raise ValueError(f"Prompt {index} has a key {key!r}, which is an argument of reward_fn: rename the key")
        content = row["prompt"]
        is_ids = isinstance(content, (list, tuple)) and all(isinstance(token, int) for token in content)
        if not (isinstance(content, str) or is_ids or is_chat(content)):
            kinds = "a text, a list of token ids or a list of messages"
            raise TypeError(f"Prompt {index} must be {kinds}, got {repr(content)[:80]}")
    return rows
