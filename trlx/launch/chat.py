"""``trlx chat``: a conversation in the terminal with what was trained, or with a model of the hub."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from trlx import logging
from trlx.launch.trained import ending_turns, find, sampler, use_device
from trlx.sampling.stopping import Stopper
from trlx.sampling.texts import Respond
from trlx.trainer.base import Trainer

logger = logging.get_logger(__name__)

NEW_TOKENS = 256
"""Tokens of an answer where neither the command nor the model's run says how many."""
HELP = (
    "/system TEXT tells the model what it is, /reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C ends an answer"
)


class Aloud(Stopper):
    """Shows a response while it is drawn: samplers call `done` after every token.

    Args:
        show: gets each piece of the text once.
    """

    def __init__(self, tokenizer: Any, stop_sequences: Sequence[str], show: Callable[[str], None]):
        super().__init__(tokenizer, stop_sequences)
        self.show = show
        self.begin()

    def begin(self) -> None:
        """Another response begins."""
        self.ids: list[int] = []
        self.shown = ""

    def done(self, ids: Sequence[int], start: int = 0) -> bool:
        self.ids.append(ids[-1])
        self.tell(self.tokenizer.decode(self.ids, skip_special_tokens=True), is_whole=False)
        return super().done(ids, start)

    def tell(self, text: str, is_whole: bool) -> None:
        """Shows what is new in `text`, but not the beginning of a character or of a stop sequence, if more may come."""
        if not is_whole:
            text = text[: len(text) - max((_overlap(text, end) for end in (*self.stop_sequences, "\ufffd")), default=0)]
        if len(text) > len(self.shown) and text.startswith(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


def _overlap(text: str, end: str) -> int:
    """How many characters of `text` may belong to `end`: where it begins in the text, or begins at the text's end."""
    if end in text:
        return len(text) - text.index(end)
    return next((size for size in range(min(len(end), len(text)), 0, -1) if text.endswith(end[:size])), 0)


class Conversation:
    """What was said, and a model that answers. Without a chat template the model goes on writing all that was said."""

    def __init__(self, trainer: Trainer, respond: Respond, system: str | None = None):
        self.respond, self.stop = respond, respond.sampling.stop
        self.has_template = bool(trainer.tokenizer.chat_template)
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets all but the system message, which `system` replaces if it is given."""
        kept = [message for message in self.messages if message["role"] == "system"]
        self.messages = [{"role": "system", "content": system}] if system else kept

    def answer(self, text: str) -> None:
        """Answers, and remembers both. After Ctrl-C the answer is what was shown.

        Raises:
            ValueError: the conversation is too long, or the chat template refuses it; then it stays as it was.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        self.stop.begin()
        try:
            (answer,) = self.respond.texts([said if self.has_template else "\n".join(each["content"] for each in said)])
            self.stop.tell(answer, is_whole=True)
        except KeyboardInterrupt:
            answer = self.stop.shown
        self.messages = [*said, {"role": "assistant", "content": answer}]


def run(
    checkpoint: str,
    tokenizer: str | None = None,
    system: str | None = None,
    gen: Sequence[str] = (),
    stop: Sequence[str] = (),
    device: str | None = None,
    seed: int = 0,
) -> int:
    """Talks until the end of the input; returns an exit status.

    Raises:
        ValueError, OSError, ImportError: a setting is wrong, or the model cannot be loaded.
    """
    use_device(device)
    source = find(checkpoint)
    trainer = sampler(source, list(gen), list(stop), tokenizer, seed=seed, max_new_tokens=NEW_TOKENS)
    aloud = Aloud(trainer.tokenizer, stop, lambda text: print(text, end="", flush=True))
    sampling = replace(ending_turns(trainer.sampling(trainer.sampling_kwargs), source), stop=aloud)
    respond = Respond(trainer.draw, trainer.tokenizer, trainer.backend.row_format, sampling)
    conversation = Conversation(trainer, respond, system)
    if not conversation.has_template:
        logger.info(f"{source.model} has no chat template: it goes on writing what was said, line by line")
    print(HELP)
    with suppress(ImportError):
        import readline  # noqa: F401  input() then edits lines and remembers them
    with suppress(EOFError):
        while _turn(conversation):
            pass
    print()
    return 0


def _turn(conversation: Conversation) -> bool:
    """Reads a line and does what it says; False: the end."""
    try:
        line = input("> ").strip()
    except KeyboardInterrupt:
        print()
        return True
    command, _, text = line.partition(" ")
    if command == "/system":
        conversation.reset(text)
    elif command == "/reset":
        conversation.reset()
    elif command.startswith("/") and command != "/quit":
        print(HELP)
    elif line and command != "/quit":
        try:
            conversation.answer(line)
            print("\n")
        except ValueError as error:
            print(f"{error}. /reset begins anew", file=sys.stderr)
    return command != "/quit"
