"""One vLLM server, spoken to over HTTP."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from trlx import logging
from trlx.backends.interrupts import asked_to_leave

logger = logging.get_logger(__name__)

LONGEST_WAIT = 30
"""Seconds between two attempts at most; the first are 1, 2, 4 ... seconds apart."""
WARN_EVERY = 60
"""Seconds between two warnings about a server that is asked again."""
HOW_TO_START = "start it with the command that `trlx vllm` prints for this config"


class ServerError(ConnectionError):
    """A server cannot do what the run needs: what, where, and what to do."""


class _TryAgain(Exception):
    """An answer that another attempt may better."""


@dataclass(frozen=True)
class Description:
    """What a server samples from."""

    instances: tuple[str, ...]
    """A name for each worker process; others after the server was started again."""
    owner: str | None
    """The run whose weights it follows; None: it has those it was started with."""
    workers: int
    vocab_size: int
    max_model_len: int
    logprobs_mode: str
    dtype: str
    device: str


class Server:
    """Asks one server, and asks again while it does not answer, up to a limit.

    Args:
        url: its address, e.g. ``http://127.0.0.1:8000``.
        timeout: seconds that one answer may take.
        patience: seconds in which a server that is gone, busy or answers with an error is tried again.
    """

    def __init__(self, url: str, timeout: float, patience: float):
        self.url, self.patience = url.rstrip("/"), patience
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.Client(base_url=self.url, timeout=httpx2.Timeout(timeout, connect=10), limits=limits)
        self.model = ""
        self._lock, self._told = threading.Lock(), -math.inf
        """When the last warning about this server was logged."""

    def describe(self) -> Description:
        """What the server samples from now.

        Raises:
            ServerError: it cannot be reached, or was started without trlx's extension.
        """
        ask = {"method": "trlx_describe"}
        said = self._again("POST", "/collective_rpc", ask)["results"] if self.model else self._first(ask)
        instances = tuple(worker.pop("instance") for worker in said)
        return Description(instances, **said[0])

    def _first(self, ask: dict[str, Any]) -> list[dict[str, Any]]:
        """The first answer of a server, which may still be starting."""
        self._again("GET", "/health")
        try:
            said = self.control("collective_rpc", ask)["results"]
        except ServerError:
            raise ServerError(f"{self.url} is a vLLM server that cannot follow a policy: {HOW_TO_START}") from None
        self.model = self._again("GET", "/v1/models")["data"][0]["id"]
        return said

    def complete(self, body: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """(ids, log-probabilities) of the ``body["n"]`` samples of one prompt.

        Raises:
            ServerError: it refuses the request, or still fails after `patience` seconds.
        """

        def checked(answer: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
            choices = [
                choice for choice in answer.get("choices", []) if choice.get("finish_reason") in ("stop", "length")
            ]
            if len(choices) != body["n"]:
                raise _TryAgain(f"gave {len(choices)} of {body['n']} samples")
            return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

        return self._again("POST", "/v1/completions", {"model": self.model, **body}, checked)

    def control(self, path: str, body: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to one request that changes the server. It is sent once.

        Raises:
            ServerError: it failed.
        """
        try:
            return self._once("POST", f"/{path}", body, parameters)
        except _TryAgain as error:
            raise ServerError(f"{self.url}/{path} {error}") from error

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def _again(self, method: str, path: str, body: dict[str, Any] | None = None, use=lambda answer: answer) -> Any:
        attempts = Retrying(
            retry=retry_if_exception_type(_TryAgain),
            wait=wait_exponential(max=LONGEST_WAIT),
            stop=stop_after_delay(self.patience) | (lambda _: asked_to_leave()),
            sleep=_sleep,
            before_sleep=self._tell,
            reraise=True,
        )
        began = time.monotonic()
        try:
            return attempts(lambda: use(self._once(method, path, body)))
        except _TryAgain as error:
            raise ServerError(
                f"The vLLM server {self.url} {error}; tried for {time.monotonic() - began:.0f} seconds "
                f"(patience in train.sampler): {HOW_TO_START}, then start or resume the run"
            ) from None

    def _tell(self, state: RetryCallState) -> None:
        """Warns that a request is made again; once in a while, as hundreds of threads may wait for the server."""
        with self._lock:
            if time.monotonic() - self._told < WARN_EVERY:
                return
            self._told = time.monotonic()
        logger.warning(
            f"The vLLM server {self.url} {state.outcome.exception()}; it is asked again for up to {self.patience:g} "
            "seconds (patience in train.sampler)"
        )

    def _once(self, method: str, path: str, body: Any = None, parameters: Any = None) -> dict[str, Any]:
        try:
            answer = self.client.request(method, path, json=body, params=parameters)
        except httpx2.TimeoutException as error:
            raise _TryAgain(f"was silent too long at {path} (timeout in train.sampler)") from error
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise _TryAgain(f"could not be reached: {error}") from error
        if answer.status_code == 429 or answer.is_server_error:
            raise _TryAgain(f"answered {path} with status {answer.status_code}: {answer.text[:300]!r}")
        if not answer.is_success:
            raise ServerError(
                f"The vLLM server {self.url} refuses {path} (status {answer.status_code}): {answer.text[:300]}"
            )
        try:
            return answer.json() if answer.content else {}
        except ValueError:
            raise ServerError(
                f"{self.url} is no vLLM server: it answers {path} with {answer.text[:100]!r}. See train.sampler.url"
            ) from None


def _sleep(seconds: float) -> None:
    """Sleeps, not much longer than until a signal asks the run to leave."""
    while seconds > 0 and not asked_to_leave():
        time.sleep(min(seconds, 1))
        seconds -= 1
