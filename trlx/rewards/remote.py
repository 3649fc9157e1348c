"""A reward_fn that asks a server."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, retry_if_result, stop_after_attempt

from trlx.rewards.calling import RewardError
from trlx.rewards.results import plain


@dataclass(eq=False, repr=False)  # the headers may hold a password
class RemoteReward:
    """A reward_fn that asks a server.

    Posts JSON ``{"samples": [...], "prompts": [...], "outputs": [...], "metadata": {name: [...]}}`` and expects
    ``{"rewards": [...]}`` (or ``"scores"``) with one entry per sample: a number, or a list of one per response token.
    Tries again after a failed connection, a time-out, status 429 or 5xx. Before that it waits as long as the header
    Retry-After says, else `backoff` seconds, then 2 and 4 times as long, each varied by half.

    Args:
        url: begins with http:// or https://; anything else is a ValueError.
        timeout: seconds of silence from the server that end an attempt; train.reward_timeout limits the whole call.
        retries: attempts after the first.
        backoff: seconds before the first retry.
        batch_size: samples per request; None: all in one.
        headers: further HTTP headers, e.g. ``{"Authorization": "Bearer ..."}``.
    """

    url: str
    _: KW_ONLY
    timeout: float = 30.0
    retries: int = 3
    backoff: float = 0.5
    batch_size: int | None = None
    headers: Mapping[str, str] | None = None

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteReward needs an address that begins with http:// or https://, got {self.url!r}")

    def __call__(
        self, samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any = None, **metadata: list[Any]
    ) -> list[float | list[float]]:
        """One entry per sample; a RewardError if the server cannot be reached, refuses, or answers in another form."""
        size, rewards = self.batch_size or max(len(samples), 1), []
        for start in range(0, len(samples), size):
            rows = slice(start, start + size)
            texts = {"samples": samples[rows], "prompts": prompts[rows], "outputs": outputs[rows]}
            question = {**texts, "metadata": {name: values[rows] for name, values in metadata.items()}}
            rewards += self._rewards(question, len(samples[rows]))
        return rewards

    def _rewards(self, question: dict[str, Any], count: int) -> list[float | list[float]]:
        try:
            body = json.dumps(question, default=_serializable)
        except TypeError as error:
            raise RewardError(f"The prompts' metadata cannot be sent as JSON: {error}") from error
        answer = self._post(body)
        try:
            parsed = answer.json()
        except ValueError:
            parsed = None
        rewards = parsed.get("rewards", parsed.get("scores")) if isinstance(parsed, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(f'{self.url} must answer JSON {{"rewards": [...]}}, but answered {_short(answer)}')
        if len(rewards) != count:
            raise RewardError(f"{self.url} answered {len(rewards)} rewards for {count} samples")
        return rewards

    def _post(self, body: str) -> httpx2.Response:
        """The answer to one request, after as many attempts as it takes."""
        is_busy = retry_if_result(lambda answer: answer.status_code == 429 or answer.is_server_error)
        attempts = Retrying(
            retry=is_busy | retry_if_exception_type(httpx2.RequestError),
            wait=self._wait,
            stop=stop_after_attempt(self.retries + 1),
            retry_error_callback=lambda state: state.outcome.result(),
        )
        headers = {"Content-Type": "application/json", "Accept": "application/json", **(self.headers or {})}
        how = {"content": body, "headers": headers, "timeout": self.timeout, "follow_redirects": True}
        try:
            answer = attempts(httpx2.post, self.url, **how)
            if answer.is_success:
                return answer
            problem = f"answered status {answer.status_code} ({answer.reason_phrase}): {_short(answer)}"
        except httpx2.TimeoutException:
            problem = f"was silent for {self.timeout} seconds"
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            problem = f"could not be reached: {error!r}"
        count = attempts.statistics["attempt_number"]
        raise RewardError(f"{self.url} {problem}; gave up after {count} attempt{'s' * (count > 1)}")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt."""
        asked = "" if state.outcome.failed else state.outcome.result().headers.get("Retry-After", "")
        # not the global generator: training draws from it, and the network must not change a run
        backoff = self.backoff * 2 ** (state.attempt_number - 1) * random.SystemRandom().uniform(0.5, 1.5)
        return float(asked) if asked.isdigit() else backoff


def _serializable(value: Any) -> Any:
    if plain(value) is value:
        raise TypeError(f"{repr(value)[:80]} is a {type(value).__name__}")
    return plain(value)


def _short(answer: httpx2.Response) -> str:
    return repr(answer.content[:300].decode(errors="replace"))
