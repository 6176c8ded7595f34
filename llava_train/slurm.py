"""Submits runs to SLURM: options in, the command line of `sbatch` and its environment out.

What happens in the job stands in `scripts/slurm/train.sbatch`, which can be submitted by hand as well. The scripts are
part of the package, so that an installed wheel submits jobs too; `scripts/` of a checkout links to them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from llava_train.config import StageConfig
from llava_train.errors import UserError
from llava_train.stage_file import load_stage, with_suffix

PACKAGE = Path(__file__).resolve().parent
REPO = PACKAGE.parent if (PACKAGE.parent / "setup.cfg").is_file() else PACKAGE
"""The folder whose `scripts/` a job runs, and which a container sees: the checkout, or the installed package."""
SCRIPT = PACKAGE / "scripts" / "slurm" / "train.sbatch"
PREFIX = "LLAVA_SLURM_"
TASK = "{task}"
"""Stands for the number of the task in the arguments of a job array."""


class SubmitError(UserError):
    """The job cannot be submitted."""


class Launcher(str, Enum):
    """What starts the ranks on a node: torchrun in one task, or a task each."""

    torchrun = "torchrun"
    srun = "srun"


@dataclass(frozen=True)
class Job:
    """What the user asks of SLURM. None: what the cluster has as its default."""

    nodes: int = 1
    gpus: int | None = None
    """A node."""
    ranks_per_node: int | None = None
    """Default: `gpus`, or 1."""
    cpus_per_rank: int | None = None
    """Default: one for the rank, and one for each worker of its loader."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: str | None = None
    launcher: Launcher = Launcher.torchrun
    setup: str | None = None
    """Shell commands; default: the environment that this process runs in."""
    container: str | None = None
    signal_before_s: int = 120
    max_requeues: int = 100
    name: str | None = None
    """Default: the name of the first stage."""
    sbatch_args: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.ranks_per_node or self.gpus or 1


@dataclass(frozen=True)
class Submission:
    """A job that is ready for `sbatch`."""

    command: list[str]
    environment: dict[str, str]
    name: str
    log: Path
    """With SLURM's %x, %j, %A and %a; while the job runs, its stop file lies beside it."""
    runs: list[Path]
    """The run folders, by task of the array, then by stage."""

    def __str__(self) -> str:
        """The command to copy into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def prepare(job: Job, configs: Sequence[str], overrides: Sequence[str] = ()) -> Submission:
    """Reads the stage files and makes the command that submits them.

    Raises:
        ConfigError: a stage file (of any task of the array) is wrong.
        SubmitError: options that contradict each other.
    """
    if job.array is None and any(TASK in text for text in [*configs, *overrides]):
        raise SubmitError(f"{TASK} is the number of a task of a job array: add --array, for example --array 0-3")
    tasks = array_tasks(job.array) if job.array is not None else [""]
    stages = [load_stages(task, configs, overrides) for task in tasks]
    runs = [stage.run_dir for of_task in stages for stage in of_task]
    if len(set(runs)) < len(runs):
        raise SubmitError(f"two stages share a run folder: {', '.join(map(str, runs))}; give each its own name")
    first = stages[0]
    name = job.name or first[0].name.removesuffix(f"-{tasks[0]}")
    log = Path(first[0].output).resolve() / "slurm" / ("%x-%j.log" if job.array is None else "%x-%A_%a.log")
    n_cpus = job.cpus_per_rank or 1 + max(stage.loader.workers for stage in first)
    arguments = ["--config", *configs, *(["--set", *overrides] if overrides else [])]
    command = [*sbatch_options(job, name, log, n_cpus), str(SCRIPT), *arguments]
    return Submission(command, script_settings(job, log.parent), name, log, runs)


def load_stages(task: str, configs: Sequence[str], overrides: Sequence[str]) -> list[StageConfig]:
    """The stages of one task of an array, named as the batch script lets them be named; "" without an array."""
    of_task = [override.replace(TASK, task) for override in overrides]
    stages = [load_stage(config.replace(TASK, task), of_task) for config in configs]
    return with_suffix(stages, task) if task else stages


def array_tasks(array: str) -> list[str]:
    """The task numbers that `sbatch --array` makes of a text, for example ["0", "2", "7"] of "0-3:2,7%2".

    Raises:
        SubmitError: SLURM would not understand it.
    """
    tasks: list[str] = []
    for part in array.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None:
            raise SubmitError(f"--array {array}: write it as SLURM does, for example 0-3 or 1,5,7 or 0-99%4")
        first, last, stride = match.groups()
        tasks += map(str, range(int(first), int(last or first) + 1, int(stride or 1)))
    if not tasks:
        raise SubmitError(f"--array {array}: has no tasks")
    return list(dict.fromkeys(tasks))


def sbatch_options(job: Job, name: str, log: Path, n_cpus: int) -> list[str]:
    """`sbatch` and its options; `n_cpus` is for one rank."""
    # As many tasks as srun will start, so that it finds their CPUs.
    n_tasks = 1 if job.launcher is Launcher.torchrun else job.ranks
    options: dict[str, object] = {
        "export": "ALL",
        "job-name": name,
        "output": log,
        "nodes": job.nodes,
        "ntasks-per-node": n_tasks,
        "cpus-per-task": n_cpus * job.ranks // n_tasks,
        "gpus-per-node": job.gpus,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "array": job.array,
        "signal": f"B:USR1@{job.signal_before_s}",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return ["sbatch", "--parsable", *given, *job.sbatch_args]


def script_settings(job: Job, folder: Path) -> dict[str, str]:
    """The environment variables that `scripts/slurm/train.sbatch` reads; `folder` is for the stop file."""
    settings = {
        "LAUNCHER": job.launcher.value,
        "RANKS": str(job.ranks),
        "SETUP": this_environment() if job.setup is None and job.container is None else job.setup,
        "CONTAINER": job.container,
        "SRUN_ARGS": " ".join(job.srun_args),
        "MAX_REQUEUES": str(job.max_requeues),
        "FOLDER": str(folder),
        "REPO": str(REPO),
    }
    return {PREFIX + name: value for name, value in settings.items() if value}


def this_environment() -> str:
    """Shell commands that lead a job to the Python environment of this process."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if activate.is_file():
        return f"source {shlex.quote(str(activate))}"
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def submit(submission: Submission, environment: Mapping[str, str] = os.environ) -> str:
    """Submits a job; returns its id.

    Raises:
        SubmitError: there is no `sbatch`, or it refused.
    """
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise SubmitError("sbatch is not on the PATH: run this on a login node, or add --dry-run to only see the job")
    submission.log.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        submission.command,
        env={**environment, **submission.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # JOB or JOB;CLUSTER


def what_to_know(submission: Submission, job_id: str) -> str:
    """What a user needs of a job that was submitted: its log and runs, and how to follow and stop it."""
    log = str(submission.log)
    for pattern, value in {"%x": submission.name, "%j": job_id, "%A": job_id, "%a": "*"}.items():
        log = log.replace(pattern, value)
    runs = [str(run) for run in submission.runs[:8]] + ["..."] * (len(submission.runs) > 8)
    return "\n".join(
        [
            f"job {job_id}",
            f"log: {log}",
            f"run folders: {', '.join(runs)}",
            f"follow: tail -F {log}",
            f"save now and go on in a new start: scancel --signal=USR1 --batch {job_id}",
            f"end: scancel {job_id}; the same llava-train command goes on",
        ]
    )
