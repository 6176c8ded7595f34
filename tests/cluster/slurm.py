"""A real SLURM cluster of one node, on this machine, for the length of a test run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.train.helpers import TIMEOUT_S, environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODE = "localhost"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait={kill_wait_s}
NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} CPUs=8 State=UNKNOWN
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


class ClusterUnavailable(Exception):
    """This machine cannot run SLURM; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `env` leads its commands to it."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str) -> str:
        """The output of a command of SLURM. Raises CalledProcessError."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, StdOut ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)


@contextmanager
def start_cluster(folder: Path, kill_wait_s: int = 10) -> Iterator[Cluster]:
    """Starts munged, slurmctld and slurmd, and ends them and every job with the block.

    Raises:
        ClusterUnavailable: they are not installed, or do not start here.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ClusterUnavailable(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        raise ClusterUnavailable("SLURM's daemons need root")
    cluster = Cluster(folder, environment(SLURM_CONF=str(folder / "slurm.conf")))
    _write_configuration(folder, kill_wait_s)
    daemons = []
    try:
        for command in _daemons(folder):
            with (folder / f"{command[0]}.out").open("wb") as out:
                daemons.append(subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out))
            if command[0] == "munged":
                _wait_until((folder / "munge.socket").exists, daemons, folder)
        _wait_until(lambda: _is_idle(cluster), daemons, folder)
        yield cluster
    finally:
        if len(daemons) == 3 and daemons[1].poll() is None:
            subprocess.run(["scancel", "--user=root"], env=cluster.env, check=False, timeout=TIMEOUT_S)
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline and cluster.run("squeue", "--noheader"):
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=TIMEOUT_S)


def _write_configuration(folder: Path, kill_wait_s: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        node=NODE,
        folder=folder,
        controller_port=free_port(),
        node_port=free_port(),
        kill_wait_s=kill_wait_s,
    )
    (folder / "slurm.conf").write_text(text)


def _daemons(folder: Path) -> list[list[str]]:
    munge = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    places = [f"--{option}={folder}/munge.{name}" for option, name in munge.items()]
    return [["munged", "--foreground", "--force", *places], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", NODE]]


def _is_idle(cluster: Cluster) -> bool:
    found = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.env, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() == "idle"


def _wait_until(ready, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        if any(daemon.poll() is not None for daemon in daemons) or time.monotonic() > deadline:
            logs = [path.read_text(errors="replace")[-500:] for path in sorted(folder.glob("*.out"))]
            raise ClusterUnavailable("SLURM does not start here: " + " | ".join(filter(None, logs)))
        time.sleep(0.1)
