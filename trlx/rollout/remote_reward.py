"""Rewards from a server: a client as reward_fn."""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from trlx.rollout.scoring import RewardError


class RemoteReward:
    """Asks a server for rewards, as reward_fn.

    Posts JSON ``{"samples": [...], "prompts": [...], "outputs": [...], "metadata": {name: [...]}}`` and expects
    ``{"rewards": [...]}`` (or ``"scores"``) with one entry per sample: a number, or a list of one per response token.
    Connections that fail, time-outs, status 429 and 5xx are tried again after `backoff` seconds, then 2 and 4 times as
    many, each varied by half at random; any other status is final.

    Args:
        url: http or https.
        timeout: seconds without a word from the server before an attempt counts as failed. What all of a call may take
            is train.reward_timeout.
        retries: attempts after the first.
        backoff: seconds before the first retry.
        batch_size: samples per request; None: all in one.
        headers: further HTTP headers, e.g. ``{"Authorization": "Bearer ..."}``.

    Raises:
        ValueError: the address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
        batch_size: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteReward needs an address that begins with http:// or https://, got {url!r}")
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = batch_size
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        # its own, because the global generator belongs to training and its draws must not depend on the network
        self._random = random.Random()

    def __call__(
        self,
        samples: Sequence[str],
        prompts: Sequence[str],
        outputs: Sequence[str],
        tokenizer: Any = None,
        **metadata: Sequence[Any],
    ) -> list[float | list[float]]:
        """One entry per sample, in order.

        Raises:
            RewardError: the server could not be reached, refused, or answered something else.
        """
        size, rewards = self.batch_size or max(len(samples), 1), []
        for start in range(0, len(samples), size):
            rows = slice(start, start + size)
            extra = {name: list(values[rows]) for name, values in metadata.items()}
            texts = {"samples": samples[rows], "prompts": prompts[rows], "outputs": outputs[rows]}
            rewards += self._rewards({**texts, "metadata": extra})
        return rewards

    def _rewards(self, question: dict[str, Any]) -> list[float | list[float]]:
        try:
            body = json.dumps(question, default=_plain).encode()
        except TypeError as error:
            raise RewardError(f"The prompts' metadata cannot be sent as JSON: {error}") from error
        answer = self._post(body)
        try:
            parsed = json.loads(answer)
        except ValueError:
            raise RewardError(f"{self.url} answered no JSON: {_short(answer)}") from None
        rewards = parsed.get("rewards", parsed.get("scores")) if isinstance(parsed, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(f'{self.url} must answer {{"rewards": [...]}}, but answered {_short(answer)}')
        count = len(question["samples"])
        if len(rewards) != count:
            raise RewardError(f"{self.url} answered {len(rewards)} rewards for {count} samples")
        return rewards

    def _post(self, body: bytes) -> bytes:
        """The answer to one request, after as many attempts as it takes."""
        problem = "was not asked"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.5))
            try:
                request = urllib.request.Request(self.url, body, self.headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"answered status {error.code} ({error.reason}): {_short(error.read())}"
                if error.code != 429 and error.code < 500:
                    raise RewardError(f"{self.url} {problem}") from error
            except TimeoutError:
                problem = f"was silent for {self.timeout} seconds"
            except (OSError, http.client.HTTPException) as error:
                problem = f"could not be reached: {getattr(error, 'reason', error)!r}"
        raise RewardError(f"{self.url} {problem}; gave up after {self.retries + 1} attempts")


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{repr(value)[:80]} is a {type(value).__name__}")


def _short(body: bytes) -> str:
    return repr(body[:300].decode(errors="replace"))
