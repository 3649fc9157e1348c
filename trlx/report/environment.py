"""What a run's numbers and speed depend on beside its settings: versions, machine, variables of the environment."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

import psutil
import torch

import trlx
from trlx.tracking import git

PACKAGES = (
    "torch transformers accelerate tokenizers numpy peft datasets matplotlib wandb tensorboard megatron-core deepspeed "
    "bitsandbytes math-verify ray vllm trl"
).split()
"""Those that are installed are told."""
VARIABLES = {
    "trlx": ["TRLX_VERBOSITY", "TRLX_TRACEBACKS", "TRLX_NO_ADVISORY_WARNINGS", "debug"],
    "processes": ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"],
    "accelerate": [
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_TORCH_DEVICE",
        "ACCELERATE_USE_CPU",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    ],
    "others": [
        "RAY_ADDRESS",
        "WANDB_MODE",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
    ],
}
"""What trlx, or a library for it, reads from the environment. No variable here holds a secret."""
WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


@functools.cache
def environment() -> dict[str, str]:
    """Command, git revision of the current folder, machine and versions. Empty entries are left out."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    told = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": "/".join(filter(None, (git("branch", "--show-current"), git("describe", "--always", "--dirty")))),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "machine": f"{platform.node()}, {platform.system()} {platform.release()}",
        "GPUs": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
        "CUDA": torch.version.cuda or "",
        "CPUs": f"{os.cpu_count()} x {cpu_name()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "trlx": " ".join(filter(None, (trlx.__version__, _revision()))),
        **{name: _version(name) for name in PACKAGES},
    }
    return {name: text for name, text in told.items() if text}


def variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for names in VARIABLES.values() for name in names if name in os.environ}


def lines(as_json: bool = False) -> Iterator[str]:
    """`environment` and `variables` for a report of a bug, as text or as one JSON object."""
    told, is_set = environment(), variables()
    if as_json:
        yield json.dumps({**told, "variables": is_set}, ensure_ascii=False, indent=1)
        return
    packages = [name for name in PACKAGES if name in told]
    rows = {name: text for name, text in told.items() if name not in (*packages, "command", "processes")}
    rows["packages"] = ", ".join(f"{name} {told[name]}" for name in packages)
    rows["not installed"] = ", ".join(name for name in PACKAGES if name not in told)
    rows["variables"] = ", ".join(f"{name}={text}" for name, text in is_set.items())
    rows["not set"] = ", ".join(name for names in VARIABLES.values() for name in names if name not in is_set)
    for name, text in rows.items():
        yield from wrap(text or "-", 80, initial_indent=f"{name:<14}", subsequent_indent=" " * 14, **WHOLE_WORDS)


def cpu_name() -> str:
    """What the processor calls itself."""
    told = Path("/proc/cpuinfo")
    found = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in found if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str:
    """The git revision of trlx itself, in brackets, where it runs from a clone."""
    clone = Path(trlx.__file__).parents[1]
    revision = git("-C", str(clone), "describe", "--always", "--dirty") if (clone / ".git").exists() else ""
    return revision and f"({revision})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
