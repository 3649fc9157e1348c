"""What measured numbers depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Machine, versions and commit, to stand beside every result."""
    import accelerate
    import torch
    import transformers

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": f"{model[0].split(':')[1].strip()} x{os.cpu_count()}" if model else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        **({"trl": version("trl")} if find_spec("trl") else {}),
        "commit": commit.strip(),
    }
