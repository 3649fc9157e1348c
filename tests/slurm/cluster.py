"""A SLURM cluster on this machine: munged, slurmctld, and a slurmd for each node, which all run as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2", "n3")
NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=trlx
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# a job that was requeued waits until the credential of its last start has expired: 120 seconds where nothing is said
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MessageTimeout=2
SchedulerParameters=sched_min_interval=100000,bf_interval=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2"


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"SLURM is not installed: there is no {absent[0]} (Debian: apt install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "munged, slurmctld and slurmd of these tests run as root"


class Cluster:
    """The daemons, from `start` to `stop`.

    Args:
        folder: for states, logs and configuration. Its path must be short: a socket is in it.
    """

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Starts all daemons, and waits until jobs can run."""
        host, ports = socket.gethostname(), free_ports(len(NODES) + 1)
        (self.folder / "state").mkdir(parents=True)
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
        text = CONFIG.format(folder=self.folder, host=host, port=ports[0], nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        # two devices that every machine has; SLURM counts them and opens neither
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        places = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.folder}/munge.{end}" for option, end in places.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *words)
        until(lambda: (self.folder / "munge.socket").exists(), "munged listens")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
            self._start("slurmd", "-D", "-N", node, name=node)
        until(lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], "all nodes are idle", seconds=30)

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons, and what they started."""
        for node in self.daemons.keys() & set(NODES):
            self.kill_node(node)
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()

    def kill_slurmd(self, name: str) -> None:
        """The node no longer answers; what its jobs have started goes on."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def kill_node(self, name: str) -> None:
        """The node is gone at once, as after a power cut: its slurmd and every process of its jobs are killed."""
        self.kill_slurmd(name)
        mark = f"SLURMD_NODENAME={name}".encode()
        tasks = {pid for pid, environment in environments() if mark in environment}
        for pid in {parent_of(pid) for pid in tasks} | tasks:
            if pid in tasks or "slurmstepd" in command_of(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def nodes_of(self, job: str) -> list[str]:
        """The names of the nodes that a job runs on, its first one first."""
        return self.ask("scontrol", "show", "hostnames", self.ask("squeue", "-h", "-j", job, "-o", "%N")).split()

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints."""
        ran = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return ran.stdout.strip() if ran.returncode == 0 else f"failed: {ran.stderr}"

    def _start(self, *command: str, name: str | None = None) -> None:
        with (self.folder / f"{name or command[0]}.output").open("w") as output:
            self.daemons[name or command[0]] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )


def environments():
    """(Process id, its environment) of every process."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_bytes().split(b"\0")


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(holds: Callable[[], bool], what: str, seconds: float = 150) -> None:
    """Waits until something holds.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} seconds: {what}")
        time.sleep(0.1)
