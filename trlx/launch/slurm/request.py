"""What a job asks SLURM for, and the environment that it runs in."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

LEAST = {"nodes": 1, "vllm_nodes": 0, "gpus_per_node": 0, "cpus": 1, "save_before": 1, "requeues": 0}


@dataclass
class Request:
    """The options of ``trlx submit`` that are about the job, not about training."""

    nodes: int = 1
    gpus_per_node: int = 1
    """Each gets a process. 0: one process a node, on CPUs."""
    cpus: int = 8
    """Cores of each process."""
    time: str | None = None
    partition: str | None = None
    sbatch: list[str] = field(default_factory=list)
    """Other options of sbatch, without the dashes."""
    save_before: int = 300
    """Seconds before the time limit at which the run is asked to save and stop."""
    requeues: int = 100
    container: str | None = None
    conda: str | None = None
    venv: str | None = None
    vllm_nodes: int = 0
    """Nodes beside `nodes`, each with a vLLM server on its GPUs."""
    vllm_python: str = "python"
    """The interpreter of an environment with vLLM, as the nodes see it."""

    @property
    def processes(self) -> int:
        """Of each node."""
        return max(self.gpus_per_node, 1)

    def check(self) -> None:
        """Raises ValueError if a number, the time or the environment is wrong."""
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        chosen = [f"--{name}" for name in ("container", "conda", "venv") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} name different environments: leave out all but one")
        if self.venv and not Path(self.venv, "bin", "python").exists():
            raise ValueError(f"--venv {self.venv} has no bin/python: name the folder of a virtual environment")
        if self.time is not None and (limit := seconds_of(self.time)) <= self.save_before:
            raise ValueError(
                f"--time {self.time} is {limit} seconds, and the run is to save {self.save_before} seconds before "
                "its end: write a longer --time or a smaller --save-before"
            )

    def options(self) -> list[str]:
        """Options of sbatch."""
        given = [
            f"--nodes={self.nodes + self.vllm_nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={self.cpus * self.processes}",
        ]
        given += [f"--gpus-per-node={self.gpus_per_node}"] * (self.gpus_per_node > 0)
        given += [f"--{name}={value}" for name in ("time", "partition") if (value := getattr(self, name))]
        given += [f"--signal=B:USR1@{self.save_before}", "--requeue", "--open-mode=append"]
        return given + [f"--{option.lstrip('-')}" for option in self.sbatch]

    def environment(self, folder: Path) -> list[str]:
        """Lines of bash that choose the interpreter and the caches. `folder` is the run's; a container sees it too."""
        home = os.path.abspath(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        lines = [f"export HF_HOME={shlex.quote(home)}", f"REQUEUES={self.requeues}"]
        if self.gpus_per_node == 0:
            lines.append("export CUDA_VISIBLE_DEVICES=")
        if self.conda:
            return [*lines, 'eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(self.conda)}"]
        if self.container:
            return [*lines, _inside(self.container, [os.getcwd(), str(folder), home])]
        python = os.path.abspath(Path(self.venv, "bin", "python")) if self.venv else sys.executable
        return [*lines, f"PYTHON={shlex.quote(python)}"]


def seconds_of(time: str) -> int:
    """The seconds of a time that is written as SLURM writes it: "90" minutes, "1:30:00", "1-12" for 36 hours.

    Raises:
        ValueError: it is no such time.
    """
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time) is None:
        raise ValueError(f"--time is {time!r}: write minutes, hours:minutes:seconds or days-hours, such as 24:00:00")
    days, _, clock = time.rpartition("-")
    parts = clock.split(":")
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * int(part) for unit, part in zip(units, parts, strict=False))


def _inside(image: str, folders: Sequence[str]) -> str:
    """The line that runs processes in a container, by apptainer or by the options that pyxis adds to srun."""
    kind, _, rest = image.partition(":")
    is_apptainer = kind in ("apptainer", "docker", "oras", "library") or image.endswith(".sif")
    image = rest if kind in ("apptainer", "pyxis") else image
    mounts = list(dict.fromkeys(folders))
    if is_apptainer:
        words = ["apptainer", "exec", "--nv", "--bind", ",".join(mounts), "--pwd", mounts[0], image]
        return f"INSIDE=({shlex.join(words)})"
    binds = ",".join(f"{folder}:{folder}" for folder in mounts)
    words = [f"--container-image={image}", f"--container-mounts={binds}", f"--container-workdir={mounts[0]}"]
    return f"STEP=({shlex.join(words)})"
