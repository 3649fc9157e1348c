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
from trlx.data.store import permutation
from trlx.data.tokenizer import beginning, begins_with, prompt_tokens, shorten
from trlx.registry import register_datapipeline

logger = logging.get_logger(__name__)

RESERVED = ("samples", "prompts", "outputs", "tokenizer")
"""Arguments of reward_fn that the library fills in; a prompt's metadata cannot have these names."""


@dataclass(slots=True)
class Prompt:
    """One tokenized prompt. Example: ``Prompt(ids=[7, 8], text="Hi", metadata={"label": 1})``."""

    ids: list[int]
    text: str | None = None
    """As the caller wrote it; None where the caller gave token ids or a chat."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The caller's further keys; each reaches reward_fn and metric_fn as a list aligned with the batch."""
    messages: list[Any] | None = None
    """The chat as the caller wrote it; None where the prompt is none."""


@register_datapipeline
class PromptPipeline:
    """Prompts of at most `max_prompt_length` tokens, ready to sample from.

    Args:
        prompts: texts (which get what the tokenizer puts in front of them, see `prompt_tokens`), lists of token ids,
            chats (lists of messages, ``{"role": "user", "content": "Hi"}``, written by the tokenizer's chat template up
            to where the assistant answers), or dicts that hold one of these as "prompt" beside any further keys, the
            same in every dict. The dicts are left as they are.
        max_prompt_length: what is longer is cut on the tokenizer's truncation side, with one warning for all; chats
            always on the left, as without their end nobody would be asked to answer. A bos in front stays.
        add_special_tokens: let the tokenizer also append what it appends by itself (encoder-decoder models want that).

    Raises:
        ValueError, TypeError: no prompts, a prompt without tokens, of another type, or with other keys than the first;
            the message says which one.
    """

    def __init__(
        self,
        prompts: Iterable[str | list[int] | list[Mapping[str, Any]] | Mapping[str, Any]],
        max_prompt_length: int,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool = False,
    ):
        if max_prompt_length < 1:
            raise ValueError(
                f"Prompts of at most {max_prompt_length} tokens are no prompts: make train.seq_length larger than "
                "max_new_tokens"
            )
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.add_special_tokens = add_special_tokens
        contents, metadata = _separate(prompts)
        ids = self._tokenize(contents)
        texts = [content if isinstance(content, str) else None for content in contents]
        chats = [list(content) if is_chat(content) else None for content in contents]
        self.prompts = [Prompt(*parts) for parts in zip(ids, texts, metadata, chats, strict=True)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def create_loader(self, *_: Any, **__: Any) -> None:
        """What CarperAI's trlx read prompts from; always a NotImplementedError."""
        raise NotImplementedError("A PromptPipeline has no loader: read prompts as pipeline[i], or from a PromptStream")

    def digest(self) -> str:
        """A short hash of tokens and metadata, to recognise other data when a run is resumed."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            # the address of an object without a repr of its own is another in every run
            metadata = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(prompt.metadata))
            digest.update(f"{prompt.ids}{metadata}".encode(errors="replace"))
        return digest.hexdigest()[:16]

    def _tokenize(self, contents: list[Any]) -> list[list[int]]:
        texts = [content for content in contents if isinstance(content, str)]
        of_texts = iter(prompt_tokens(texts, self.tokenizer, self.add_special_tokens))
        ids = []
        for index, content in enumerate(contents):
            if is_chat(content):
                ids.append(chat_prompt(content, self.tokenizer, f"Prompt {index}"))
            else:
                ids.append(next(of_texts) if isinstance(content, str) else list(content))
        for index, tokens in enumerate(ids):
            if not tokens:
                raise ValueError(
                    f"Prompt {index} has no tokens, but a model needs one to start from: instead of an empty prompt "
                    f"write the tokenizer's bos_token, {self.tokenizer.bos_token or self.tokenizer.eos_token!r}"
                )
        return self._cut_long_ones(contents, ids)

    def _cut_long_ones(self, contents: list[Any], ids: list[list[int]]) -> list[list[int]]:
        limit = self.max_prompt_length
        long = [index for index, tokens in enumerate(ids) if len(tokens) > limit]
        start = beginning(self.tokenizer) if long else []
        sides = {index: "left" if is_chat(contents[index]) else self.tokenizer.truncation_side for index in long}
        for index, side in sides.items():
            if self.add_special_tokens and isinstance(contents[index], str):  # those at its end must survive, too
                ids[index] = self.tokenizer(contents[index], truncation=True, max_length=limit)["input_ids"]
            else:
                ids[index] = shorten(ids[index], limit, side, begins_with(ids[index], start))
        if long:
            logger.warning(
                f"{len(long)} of {len(ids)} prompts were longer than {limit} tokens (train.seq_length less the "
                f"max_new_tokens of generation) and were cut on the {' or '.join(sorted(set(sides.values())))}"
            )
        return ids


class PromptStream:
    """An endless sequence of a pipeline's prompts: every pass in a new shuffled order.

    The order follows from the seed alone and `position`, the number of prompts drawn so far, is the whole state: a
    stream set to the position of another one goes on exactly as that one would.
    """

    def __init__(self, pipeline: PromptPipeline, seed: int):
        self.pipeline = pipeline
        self.seed = seed
        self.position = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        taken = [self._at(position) for position in range(self.position, self.position + count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Prompt:
        number, offset = divmod(position, len(self.pipeline))
        return self.pipeline[permutation(len(self.pipeline), self.seed, "prompts", number)[offset]]


def _separate(prompts: Iterable[Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """What to tokenize and what to hand to reward_fn, after checking both."""
    if isinstance(prompts, (str, Mapping)):
        raise TypeError(f"prompts must be a list of prompts, not one {type(prompts).__name__}: write [prompt]")
    rows = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
    if not rows:
        raise ValueError("The list of prompts is empty: pass at least one prompt")
    for index, row in enumerate(rows):
        _check(index, row, rows[0])
    return [row["prompt"] for row in rows], [{k: v for k, v in row.items() if k != "prompt"} for row in rows]


def _check(index: int, row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if "prompt" not in row:
        raise ValueError(f'Prompt {index} is a dict without the key "prompt"; it has {sorted(map(str, row))}')
    if row.keys() != first.keys():
        raise ValueError(
            f"Prompt {index} has the keys {sorted(map(str, row))}, prompt 0 has {sorted(map(str, first))}: "
            "give every prompt the same keys"
        )
    taken = [key for key in RESERVED if key in row]
    if taken:
        raise ValueError(f"Prompt {index} has a key {taken[0]!r}, which is an argument of reward_fn already: rename it")
    content = row["prompt"]
    is_ids = isinstance(content, (list, tuple)) and all(isinstance(token, int) for token in content)
    if not (isinstance(content, str) or is_ids or is_chat(content)):
        raise TypeError(f"Prompt {index} must be a text, a list of token ids or of messages, got {repr(content)[:80]}")
