"""Which of several processes this one is: what torchrun and deepspeed say of it, and srun in words of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, MutableMapping

from llava_train.errors import UserError


class LaunchError(UserError):
    """The processes were started in a way that cannot work."""


_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Settings of torch's allocator: the first hides the others, which are older names."""
_LAUNCHERS = (
    "start it by torchrun, deepspeed or srun, as in: torchrun --standalone --nproc_per_node 8 scripts/train.py ..., or "
    "by plain python for one process"
)


def set_for_libraries(environment: MutableMapping[str, str]) -> None:
    """Sets variables that libraries read in each process of a run, unless the user has set them.

    Call it before CUDA is used: torch reads its allocator's settings once, at the first allocation.
    """
    # Packs have all sizes: between blocks of fixed sizes, memory would be left that no pack fits in.
    if not any(name in environment for name in _ALLOCATOR):
        environment[_ALLOCATOR[0]] = "expandable_segments:True"
    # Else each rank asks the hub, in a thread of its own, to convert a model that has only `.bin` files.
    environment.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, where no launcher set them: from srun, or of one process.

    Raises:
        LaunchError: what a launcher said is not whole, or not what this package understands; or srun started several
            tasks, and does not say on which hosts.
    """
    if "RANK" in environment:
        _check_places(environment)
        return {}
    n_tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if n_tasks == 1:
        _refuse_many(environment)
        places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        return {**places, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free one: alone, nobody asks
    if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]:
        raise LaunchError(
            f"srun started {n_tasks} tasks, and {' and '.join(missing)} of this one is not set: hand the variables of "
            "SLURM on to the container or shell that it runs in, or start torchrun by one task a node"
        )
    places = {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"]}
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    # Of all ports below those that the system gives to others, one that another step of the machine hardly has.
    port = 12000 + (int(environment.get("SLURM_JOB_ID", "0")) * 7 + int(environment.get("SLURM_STEP_ID", "0"))) % 18000
    return {**places, "WORLD_SIZE": str(n_tasks), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def check_gpus(environment: Mapping[str, str], n_gpus: int) -> None:
    """Refuses more processes on a machine than it has GPUs; none at all is another matter.

    Args:
        environment: of this process, with what `launch_environment` found.
        n_gpus: that torch sees.

    Raises:
        LaunchError: on every process of the machine where its launcher tells their number, else on those without one.
    """
    local_rank = int(environment["LOCAL_RANK"])
    told = max(_number(environment, name, 0) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    n_here = max(local_rank + 1, told)
    if not 0 < n_gpus < n_here:
        return
    error = LaunchError(
        f"there are more processes on this machine than GPUs: {n_here} and {n_gpus} (CUDA_VISIBLE_DEVICES: "
        f"{environment.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one a GPU: --nproc_per_node {n_gpus} for "
        f"torchrun, --num_gpus {n_gpus} for deepspeed; and let srun show all GPUs to each of its tasks, by "
        "--gpus-per-node and not --gpus-per-task"
    )
    error.on_every_rank = bool(told) or local_rank != n_gpus
    raise error


def note_on_launch(environment: Mapping[str, str], found: Mapping[str, str], n_gpus: int) -> str | None:
    """What the user may not have meant: one process beside several GPUs, which no launcher started.

    Args:
        found: by `launch_environment`.
    """
    if n_gpus < 2 or found.get("WORLD_SIZE") != "1" or "SLURM_STEP_NUM_TASKS" in environment:
        return None
    return (
        f"note: this one process trains on one of {n_gpus} GPUs; for all of them: "
        f"torchrun --standalone --nproc_per_node {n_gpus} scripts/train.py ..."
    )


def _check_places(environment: Mapping[str, str]) -> None:
    """Raises LaunchError for a RANK without its fellows, or one that is none of the run's."""
    if missing := [name for name in _PLACES if not environment.get(name)]:
        raise LaunchError(
            f"RANK is set ({environment['RANK']}), as by a launcher, but {', '.join(missing)} is not: {_LAUNCHERS}, "
            "where RANK must not be set"
        )
    rank, n_ranks = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if not 0 <= rank < n_ranks:
        raise LaunchError(f"RANK is {rank}, but WORLD_SIZE {n_ranks}: ranks count from 0; {_LAUNCHERS}")


def _refuse_many(environment: Mapping[str, str]) -> None:
    """Raises LaunchError where a launcher started several processes, each of which would take itself for the run."""
    for name in _BY_MPI:
        if (n_processes := _number(environment, name, 1)) > 1:
            raise LaunchError(
                f"{n_processes} processes were started by mpirun ({name}), and each would train the whole run: "
                f"{_LAUNCHERS}"
            )
    n_tasks = _number(environment, "SLURM_NTASKS", 1)
    if n_tasks > 1 and "SLURM_STEP_ID" in environment and "SLURM_STEP_NUM_TASKS" not in environment:
        raise LaunchError(
            f"srun started {n_tasks} tasks, and SLURM_STEP_NUM_TASKS is not set: hand the variables of SLURM on to the "
            "container or shell that each runs in, or start torchrun by one task a node"
        )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdecimal():
        raise LaunchError(f"{name} is {value!r}, which is no number: {_LAUNCHERS}")
    return int(value)


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
