"""``trlx vllm``: the command that starts a vLLM server for a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from trlx.backends.vllm import inside
from trlx.config import TRLConfig

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""By ``train.mixed_precision``; vLLM's float32 otherwise."""


class Command(NamedTuple):
    """A program with its arguments, and the variables that it needs."""

    variables: Mapping[str, str]
    words: list[str]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*settings, shlex.join(self.words)])


def command(
    config: TRLConfig,
    python: str = "python",
    tensor_parallel: int = 1,
    url: str | None = None,
    more: Sequence[str] = (),
) -> Command:
    """What starts a server that fits a run.

    Args:
        python: the interpreter of an environment with vLLM; it needs no trlx.
        tensor_parallel: GPUs of this server.
        url: which of the addresses in ``train.sampler.url``; None: the first.
        more: further options of vLLM, which go over the others.

    Raises:
        ValueError: the config does not sample from servers, or its model has no name.
    """
    sampler = config.train.sampler
    sampler = {"engine": sampler} if isinstance(sampler, str) else sampler
    if not isinstance(sampler, Mapping) or sampler.get("engine") != "vllm":
        raise ValueError("train.sampler is not vllm in this config: add train.sampler.engine=vllm, or the layer vllm")
    urls = sampler.get("url", "http://127.0.0.1:8000")
    urls = [urls] if isinstance(urls, str) else list(urls)
    if url is not None and url not in urls:
        raise ValueError(f"--url {url} is none of train.sampler.url: {', '.join(urls)}")
    address = urlsplit(url or urls[0])
    if address.port is None:
        raise ValueError(f"train.sampler.url {address.geturl()} names no port: write {address.geturl()}:8000")
    model = config.model.model_path
    if not isinstance(model, (str, Path)) or model == "tiny":
        raise ValueError("model.model_path must be the name or folder of a model, which vLLM can load")
    tokenizer = config.tokenizer.tokenizer_path
    words = {
        "model": str(model),
        "tokenizer": str(tokenizer) if isinstance(tokenizer, (str, Path)) else str(model),
        "host": address.hostname,
        "port": str(address.port),
        "dtype": DTYPES.get(config.train.mixed_precision, "float32"),
        "max-model-len": str(config.train.seq_length),
        "tensor-parallel-size": str(tensor_parallel),
        "seed": str(config.train.seed),
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "worker-extension-cls": "trlx_vllm.engine.Follower",
        "weight-transfer-config": '{"backend": "trlx"}',
    }
    program = [python, "-m", "vllm.entrypoints.openai.api_server"]
    options = [word for name, value in words.items() for word in (f"--{name}", value)]
    # the routes through which weights arrive are vLLM's development mode
    variables = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(inside.__file__).parent)}
    return Command(variables, [*program, *options, *more])


def start(asked: Command) -> None:
    """Becomes the server: this process goes on as it.

    Raises:
        FileNotFoundError: there is no such interpreter.
    """
    paths = [asked.variables["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execvpe(asked.words[0], asked.words, os.environ | asked.variables | {"PYTHONPATH": os.pathsep.join(paths)})
