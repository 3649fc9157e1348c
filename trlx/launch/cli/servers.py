"""Servers that a run needs beside it."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer

from trlx.launch.cli.tools import example
from trlx.launch.cli.train import Model, Words

commands = typer.Typer()

EXAMPLE = example(
    "trlx vllm grpo qwen3-4b vllm",
    "trlx vllm grpo qwen3-4b vllm --python ~/vllm/bin/python --start",
    "trlx vllm grpo qwen3-4b vllm -- --gpu-memory-utilization 0.3",
)


@commands.command("vllm", epilog=EXAMPLE)
def vllm(
    settings: Words = None,
    model: Model = None,
    python: Annotated[str, typer.Option(metavar="FILE", help="the interpreter of an environment with vLLM")] = "python",
    tensor_parallel: Annotated[int, typer.Option(metavar="N", help="GPUs of this server")] = 1,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="which of train.sampler.url  [default: the first]")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="start it here, instead of printing the command")] = False,
) -> int:
    """The command that starts the vLLM server of a run (train.sampler.engine=vllm). What stands behind -- are options
    of vLLM.

    Its development mode lets every client load weights and call methods: keep it on localhost or a private network.
    """
    from trlx.launch import vllm as servers
    from trlx.launch.job import Job
    from trlx.launch.settings import settings_of

    words = settings or []
    own = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    config = settings_of(own, Job("train", model=model).typed()).config
    command = servers.command(config, python, tensor_parallel, url, words[len(own) :])
    if start:
        servers.start(command)
    print(command)
    return 0
