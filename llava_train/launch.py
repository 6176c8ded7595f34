"""Which of several processes this one is: what torchrun and deepspeed say of it, and srun in words of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from llava_train.errors import UserError


class LaunchError(UserError):
    """The processes were started in a way that cannot work."""


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, where no launcher set them: from srun, or of one process.

    Raises:
        LaunchError: srun started several tasks, and does not say on which hosts.
    """
    if "RANK" in environment:
        return {}
    n_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if n_tasks == 1:
        places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        return {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free one: alone, nobody asks
    places = {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"]}
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    # Of all ports below those that the system gives to others, one that another step of the machine hardly has.
    port = 12000 + (int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment.get("SLURM_STEP_ID", "0"))) % 18000
    return {**places, "WORLD_SIZE": str(n_tasks), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that speaks for all of them."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def _first_host(environment: Mapping[str, str]) -> str:
    """The host of srun's first task."""
    if environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    try:
        answer = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise LaunchError(
            f"srun started tasks on several hosts ({hosts}), and `scontrol show hostnames` does not name them: {error}"
            "; set MASTER_ADDR to the host of the first task"
        ) from error
