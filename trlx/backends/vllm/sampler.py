"""``train.sampler: {engine: vllm}``: vLLM servers draw the samples, from copies of the weights that train."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedTokenizerBase

from trlx import logging
from trlx.backends.base import Backend
from trlx.backends.distress import Interrupted
from trlx.backends.interrupts import interruptible
from trlx.backends.vllm.channel import Broadcast, Folder, chunks, resume
from trlx.backends.vllm.server import HOW_TO_START, Description, Server, ServerError
from trlx.backends.vllm.threads import Threads
from trlx.batch import Sample
from trlx.data.collate import EncoderDecoderRows
from trlx.registry import register_sampler
from trlx.sampling.base import Sampler, Weights
from trlx.sampling.settings import SamplingConfig

logger = logging.get_logger(__name__)

PASSED_ON = {"repetition_penalty": 1.0, "min_p": 0.0}
"""Settings beside the named ones that vLLM knows under the same name, and the values that change nothing."""
TRANSPORTS = ("auto", "gloo", "nccl", "folder")
REQUESTS = 256
"""Requests that one server works on at once; it queues more by itself, but each takes a thread here."""


@register_sampler("vllm")
class VLLMSampler(Sampler):
    """Draws from vLLM servers. They get the weights when the first samples after an update are asked for.

    The main process talks to the servers; the others get their samples from it.

    Args:
        url: the address of a server, or a list of them, which share the prompts.
        transport: "gloo" or "nccl", a process group that the servers' workers join; "folder", files in `folder`; or
            "auto": nccl if trainer and servers have GPUs, else gloo.
        folder: a folder on a disk that trainer and servers share.
        host: this machine's address as the servers reach it; None: found by itself.
        timeout: seconds that one answer may take.
        patience: seconds in which a server that is gone or fails is tried again before the run ends.

    Raises:
        ValueError: an argument, or the model, does not fit.
    """

    works_ahead = True

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        url: str | list[str] = "http://127.0.0.1:8000",
        transport: str = "auto",
        folder: str | None = None,
        host: str | None = None,
        timeout: float = 600.0,
        patience: float = 600.0,
    ):
        urls = list(url) if isinstance(url, (list, tuple)) else [url]
        if not urls or not all(map(_is_address, urls)):
            raise ValueError(
                f"train.sampler.url must be an address such as http://127.0.0.1:8000, without /v1, or several: {url!r}"
            )
        if transport not in TRANSPORTS:
            raise ValueError(f"train.sampler.transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        if (transport == "folder") != (folder is not None):
            raise ValueError("train.sampler.folder and transport: folder belong together: write both, or neither")
        if isinstance(backend.row_format, EncoderDecoderRows):
            raise ValueError("train.sampler vllm works with decoders, not with encoder-decoder models: leave it out")
        self.backend, self.transport, self.folder, self.host = backend, transport, folder, host
        self.servers = [Server(each, timeout, patience) for each in urls]
        self.owner = uuid.uuid4().hex
        self.threads = Threads(REQUESTS)
        self.abouts: dict[str, Description] = {}
        """What each server said of itself when it got weights last, by its address."""
        self.channels: dict[str, Broadcast | Folder] = {}
        self._sent: dict[str, int] = {}
        """The version of the weights that each server has."""
        self._weights: Weights | None = None
        self._begun: list[_Begun] = []
        self._begun_with: Any = None
        """What the requests for these said of sampling."""

    def check(self, sampling: SamplingConfig) -> None:
        where, extra = sampling.where, sampling.extra
        if extra.get("beta") is not None:
            raise ValueError(f"{where}.beta needs ILQL's Q heads, which vLLM does not have: leave out train.sampler")
        for name, value in extra.items():
            if name not in PASSED_ON and value not in (None, False, 1):
                known = ", ".join(["temperature, top_k, top_p, min_new_tokens", *PASSED_ON])
                raise ValueError(f"{where}.{name} is not passed on to vLLM: leave it out; known are {known}")
        self.backend.on_main(lambda: [self._check_server(server, sampling) for server in self.servers])

    def sync(self, version: int, weights: Weights) -> None:
        super().sync(version, weights)
        self._weights = weights

    def generate(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        """See `Sampler.generate`.

        Raises:
            ServerError: on every process, if a server fails for longer than `patience`.
        """
        return self._draw(prompts, sampling, begun=False)

    def finish(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[Sample]:
        return self._draw(prompts, sampling, begun=True)

    def begin(self, prompts: list[list[int]], sampling: SamplingConfig) -> None:
        rows = self.backend.gather_objects(prompts)  # of all data ranks
        self._update()
        self.backend.on_main(lambda: self._begin(rows, sampling))

    def begun(self) -> list[Any]:
        try:
            return [self._begun_with, *([each.prompt, each.version, *each.wait()] for each in self._begun)]
        except ServerError as error:  # a checkpoint can be written without a server
            logger.warning(f"What was sampled ahead is lost, and will be sampled again: {error}")
            self._begun = []
            return []

    def go_on(self, begun: list[Any]) -> None:
        self._begun_with, *rows = begun or [None]
        self._begun = [_Begun(ids, version, lambda found=found: found) for ids, version, *found in rows]
        # a checkpoint was loaded: the weights of a version may be others now
        self._sent = dict.fromkeys(self._sent, -1)

    def close(self) -> None:
        self.threads.close()
        for each in (*self.channels.values(), *self.servers):
            each.close()

    def _check_server(self, server: Server, sampling: SamplingConfig) -> None:
        about, size = server.describe(), self.backend.vocab_size
        if about.logprobs_mode != "processed_logprobs":
            raise ServerError(
                f"The vLLM server {server.url} gives {about.logprobs_mode}, not processed_logprobs, those after "
                f"temperature: {HOW_TO_START}"
            )
        if about.vocab_size != size:
            raise ServerError(
                f"The vLLM server {server.url} has a model of {about.vocab_size} tokens, the policy has {size}: "
                f"{HOW_TO_START}"
            )
        if sampling.max_new_tokens >= about.max_model_len:
            raise ServerError(
                f"The vLLM server {server.url} reads {about.max_model_len} tokens (--max-model-len), too few for "
                f"{sampling.where}.max_new_tokens {sampling.max_new_tokens} and a prompt: {HOW_TO_START}"
            )
        self.abouts.setdefault(server.url, about)

    # weights

    def _update(self) -> None:
        """Sends the weights to the servers that lack them, again and again while that fails."""
        began = time.monotonic()
        while urls := self.backend.on_main(interruptible()(self._stale_at_rest)):
            error = self._send([server for server in self.servers if server.url in urls])
            if error is not None:
                self.backend.on_main(interruptible()(lambda error=error: self._wait(error, time.monotonic() - began)))

    def _wait(self, error: str, seconds: float) -> None:
        """Waits before the weights are sent again, or gives up."""
        if seconds > self.servers[0].patience:
            raise ServerError(f"The weights of step {self.version} did not reach the vLLM servers: {error}")
        logger.warning(f"The weights of step {self.version} did not reach the vLLM servers and are sent again: {error}")
        time.sleep(1)

    def _stale(self) -> list[str]:
        """The servers that have other weights than those of `version`."""
        return [server.url for server in self.servers if not self._is_current(server)]

    def _stale_at_rest(self) -> list[str]:
        """The same; if there are any, after the requests that were begun are done with the old weights."""
        urls = self._stale()
        for each in self._begun if urls else ():
            each.wait()
        return urls

    def _is_current(self, server: Server) -> bool:
        now, known = server.describe(), self.abouts[server.url]
        self.abouts[server.url] = now
        if now.instances != known.instances:
            # what it has drawn since may come from the weights it was started with
            self._sent.pop(server.url, None)
            self._begun = []
        if server.url not in self._sent:
            return False
        if now.owner != known.owner:
            raise ServerError(f"Another run sends its weights to the vLLM server {server.url}: give each run its own")
        return self._sent[server.url] == self.version

    def _send(self, servers: list[Server]) -> str | None:
        """Sends the weights; returns why that failed. Every process reads all weights, as they gather them together."""
        error = self._attempt(lambda: [self._channel(server).begin() for server in servers])
        for chunk in chunks(self._weights()):
            error = error or self._attempt(lambda chunk=chunk: [self.channels[s.url].send(chunk) for s in servers])
        error = error or self._attempt(lambda: [self.channels[server.url].end() for server in servers])
        if error:
            self._recover(servers)
        elif self.backend.is_main:
            self._sent |= {server.url: self.version for server in servers}
            self.abouts |= {server.url: server.describe() for server in servers}
        return self.backend.on_main(lambda: error)

    def _attempt(self, work: Callable[[], Any]) -> str | None:
        """Does `work` on the main process; returns the message of its error."""
        try:
            if self.backend.is_main:
                interruptible()(work)()
        # every process hears of the error together, before the next attempt; also of a signal
        except (Exception, Interrupted) as error:
            return str(error) or type(error).__name__
        return None

    def _channel(self, server: Server) -> Broadcast | Folder:
        if server.url not in self._sent:
            if server.url in self.channels:
                self.channels.pop(server.url).close()
            self.channels[server.url] = self._open(server, self.abouts[server.url])
        return self.channels[server.url]

    def _open(self, server: Server, about: Description) -> Broadcast | Folder:
        if self.folder is not None:
            return Folder(server, about, self.folder, self.owner)
        device = self.backend.device
        has_gpus = device.type == "cuda" == about.device
        kind = self.transport if self.transport != "auto" else "nccl" if has_gpus else "gloo"
        return Broadcast(server, about, kind, device, self.host, self.owner)

    def _recover(self, servers: list[Server]) -> None:
        """Ends a transfer that has failed, so that the next one finds the servers as they were."""
        for server in servers:
            self._sent.pop(server.url, None)
            for step in (lambda s=server: s.control("finish_weight_update"), lambda s=server: resume(s)):
                self._attempt(step)

    # samples

    def _draw(self, prompts: list[list[int]], sampling: SamplingConfig, begun: bool) -> list[Sample]:
        shares = self.backend.gather_objects([len(prompts)])  # of each data rank
        rows = self.backend.gather_objects(prompts)
        while True:
            self._update()
            samples = self.backend.on_main(interruptible()(lambda: self._ask(rows, sampling, begun)))
            if samples is not None:
                start = sum(shares[: self.backend.data_rank])
                return samples[start : start + len(prompts)]

    def _ask(self, rows: list[list[int]], sampling: SamplingConfig, begun: bool) -> list[Sample] | None:
        """A sample for each prompt; None if a server was started again meanwhile, with other weights."""
        fits = begun and self._begun_with == _body(sampling)
        had = [self._taken(ids) if fits else None for ids in rows]
        missing = [ids for ids, found in zip(rows, had, strict=True) if found is None]
        new = iter(self._requested(missing, sampling))
        answers = [found or next(new) for found in had]
        is_policy = sampling.do_sample and sampling.top_k == 0 and sampling.top_p == 1 and not _extra(sampling)
        samples = []
        for each in answers:
            ids, logprobs = each.wait()
            samples.append(Sample(ids, logprobs if is_policy else None, each.version))
        return None if missing and self._stale() else samples

    def _begin(self, rows: list[list[int]], sampling: SamplingConfig) -> None:
        self._begun, self._begun_with = self._requested(rows, sampling), _body(sampling)

    def _taken(self, prompt: list[int]) -> _Begun | None:
        """A sample that was begun for a prompt, and now is no longer."""
        place = next((place for place, each in enumerate(self._begun) if each.prompt == prompt), None)
        return None if place is None else self._begun.pop(place)

    def _requested(self, prompts: list[list[int]], sampling: SamplingConfig) -> list[_Begun]:
        """Asks the servers in turn, for all samples of a prompt at once, with a seed of its own."""
        groups = [(ids, len(list(rows))) for ids, rows in itertools.groupby(prompts)]
        shared, seeds = _body(sampling), torch.randint(2**31, (len(groups),)).tolist()
        asked = list(zip(groups, seeds, itertools.cycle(self.servers)))
        for (ids, _), _, server in asked:
            self._check_length(server, ids, sampling)
        begun = []
        for (ids, count), seed, server in asked:
            job = self.threads.submit(server.complete, {**shared, "prompt": ids, "n": count, "seed": seed})
            begun += [_Begun(ids, self.version, lambda j=job, i=index: j.result()[i]) for index in range(count)]
        return begun

    def _check_length(self, server: Server, ids: list[int], sampling: SamplingConfig) -> None:
        limit = self.abouts[server.url].max_model_len
        if len(ids) + sampling.max_new_tokens > limit:
            raise ServerError(
                f"A prompt of {len(ids)} tokens and {sampling.where}.max_new_tokens {sampling.max_new_tokens} are more "
                f"than the {limit} tokens that the vLLM server {server.url} reads: start it with a larger "
                "--max-model-len"
            )


@dataclass(frozen=True)
class _Begun:
    """A sample that is being drawn, or is there."""

    prompt: list[int]
    version: int
    wait: Callable[[], tuple[list[int], list[float]]]
    """Returns it: ids, and log-probabilities."""


def _is_address(url: Any) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and parts.port != 0 and not parts.path.rstrip("/").endswith("/v1")
    except (ValueError, AttributeError):  # a port that is none; no text
        return False


def _extra(sampling: SamplingConfig) -> dict[str, Any]:
    given = {name: sampling.extra.get(name) for name in PASSED_ON}
    return {name: value for name, value in given.items() if value not in (None, PASSED_ON[name])}


def _body(sampling: SamplingConfig) -> dict[str, Any]:
    """What the requests for all prompts say."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature if sampling.do_sample else 0.0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        # the model's own list of tokens that end a text may differ from the config's
        "ignore_eos": True,
        "stop_token_ids": sampling.eos_token_ids,
        "stop": sampling.stop.stop_sequences if sampling.stop else [],
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        **_extra(sampling),
    }
