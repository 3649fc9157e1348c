"""Names for runs, from the command and from git."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def default_run_name(model_path: Any, num_processes: int) -> str:
    """``script/model/Ngpus:branch``; the branch is left out where there is none. `model_path` as in `model_name`."""
    gpus = f"{num_processes}gpu{'s' if num_processes > 1 else ''}"
    branch = git("branch", "--show-current")
    return f"{Path(sys.argv[0]).stem or 'python'}/{model_name(model_path)}/{gpus}" + (f":{branch}" if branch else "")


def model_name(model_path: Any) -> str:
    """What a model is called, from a path, a hub name, or the dict of a model's configuration."""
    if isinstance(model_path, Mapping):
        model_path = model_path.get("_name_or_path") or model_path.get("model_type") or "model"
    return Path(model_path).name


def git(*arguments: str) -> str:
    """What git prints about the current folder; "" where git fails or is not installed."""
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
