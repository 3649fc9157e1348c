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

    from trlx.launch.reporter import cpu_name

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    return {
        "cpu": f"{cpu_name()} x{os.cpu_count()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        **({"trl": version("trl")} if find_spec("trl") else {}),
        "commit": commit.strip(),
    }
