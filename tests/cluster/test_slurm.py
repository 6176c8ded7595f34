"""The smoke recipe on a real SLURM, submitted by `llava-train slurm`, preempted, and compared with a run that was not.

All runs train on two ranks in two stages; `straight` is never interrupted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.slurm import Cluster
from tests.train.helpers import ROOT, TIMEOUT_S, read_lines

pytestmark = pytest.mark.cluster

N_STEPS = {"smoke-stage1": 60, "smoke-stage2": 12}
"""So many that there is time to interrupt each: the second trains under ZeRO 3, whose steps take longer."""
MIDWAY = 3
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def copy_stage(folder: Path, name: str) -> str:
    """Copies a stage of the smoke recipe, made longer; it evaluates at its end alone, for answers take longer than steps."""
    content = yaml.safe_load((ROOT / f"configs/smoke/{name}.yaml").read_text(encoding="utf-8"))
    n_steps = N_STEPS[content["name"]]
    content |= {"schedule": {"max_steps": n_steps, "epochs": 99}, "checkpoint": {"every": n_steps // 3}}
    if "eval" in content:
        content["eval"]["every"] = n_steps
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return f"{name}.yaml"


class Submitted:
    """A job of `llava-train slurm`."""

    def __init__(self, cluster: Cluster, data: Path, name: str, options: str) -> None:
        self.cluster, folder = cluster, data.parent / name
        self.runs = folder / "runs"
        shutil.copytree(data, folder / "configs/smoke/data")
        stages = [copy_stage(folder, stage) for stage in ("stage1", "stage2")]
        command = [sys.executable, "-m", "llava_train", "slurm", "--config", *stages, *options.split()]
        done = subprocess.run(command, cwd=folder, env=cluster.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.said = done.stdout
        self.id = self.said.splitlines()[0].removeprefix("job ")

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.runs / "slurm").glob("*.log")))

    def losses(self, run: str) -> list[tuple[int, float]]:
        lines = read_lines(self.runs / run / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def until(self, reached: Callable[[], Any]) -> None:
        """Waits; fails with the log when the job ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not reached():
            assert time.monotonic() < deadline, self.log()
            assert self.cluster.job(self.id)["JobState"] not in ENDED, self.log()
            time.sleep(0.05)

    def until_midway(self, run: str) -> None:
        metrics = self.runs / run / "metrics.jsonl"
        self.until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= MIDWAY)

    def until_requeued(self, times: int = 1) -> None:
        """Waits until SLURM has it in the queue again, where it would let it wait for two minutes: seconds are enough.

        A start in the same second would find its credential revoked.
        """

        def waits_again() -> bool:
            job = self.cluster.job(self.id)
            return job["JobState"] == "PENDING" and job["Restarts"] == str(times)

        self.until(waits_again)
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")

    def end(self) -> dict[str, str]:
        deadline = time.monotonic() + TIMEOUT_S
        while (job := self.cluster.job(self.id))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return job


@pytest.fixture(scope="module")
def straight(cluster: Cluster, data: Path) -> Submitted:
    job = Submitted(cluster, data, "straight", "--ranks-per-node 2 --time 10")
    ended = job.end()
    assert ended["JobState"] == "COMPLETED", job.log()
    return job


def assert_same_losses(job: Submitted, straight: Submitted) -> None:
    for run, n_steps in N_STEPS.items():
        assert [step for step, _ in straight.losses(run)] == list(range(1, n_steps + 1))
        assert job.losses(run) == straight.losses(run), run


def test_the_log_and_the_command_name_the_run_folders(straight: Submitted) -> None:
    assert f"log: {straight.runs}/slurm/smoke-stage1-{straight.id}.log" in straight.said
    for run in N_STEPS:
        assert f"runs/{run}" in straight.said
        assert f"run folder runs/{run}" in straight.log()
    assert f"job {straight.id}, incarnation 0, " in straight.log()
    assert f"log {straight.runs}/slurm/smoke-stage1-{straight.id}.log" in straight.log()


def test_a_signal_saves_and_requeues_and_the_losses_are_those_of_an_uninterrupted_run(
    cluster: Cluster, data: Path, straight: Submitted
) -> None:
    job = Submitted(cluster, data, "signalled", "--ranks-per-node 2 --time 10")
    job.until_midway("smoke-stage1")
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.until_requeued()
    assert "exit code 85" in job.log()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log()
    assert "incarnation 1, " in job.log()
    assert_same_losses(job, straight)


def test_an_operators_requeue_changes_no_loss_with_a_task_of_srun_a_rank(
    cluster: Cluster, data: Path, straight: Submitted
) -> None:
    job = Submitted(cluster, data, "requeued", "--ranks-per-node 2 --time 10 --launcher srun")
    job.until_midway("smoke-stage2")
    cluster.run("scontrol", "requeue", job.id)
    job.until_requeued()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log()
    assert job.log().count("SIGTERM: ranks save at the next step") == 1
    assert_same_losses(job, straight)


def test_tasks_of_an_array_keep_runs_apart(cluster: Cluster, data: Path) -> None:
    job = Submitted(
        cluster, data, "array", "--array 1-2 --time 10 --launcher srun --set seed={task} schedule.max_steps=4"
    )
    for task in (1, 2):
        job.id, array = f"{job.id.partition('_')[0]}_{task}", job.id
        assert job.end()["JobState"] == "COMPLETED", job.log()
    losses = {task: [job.losses(f"{run}-{task}") for run in N_STEPS] for task in (1, 2)}
    assert [len(stage) for task in losses.values() for stage in task] == [4, 4, 4, 4]
    assert losses[1] != losses[2]
    assert sorted(path.name for path in job.runs.glob("smoke-*")) == [f"{run}-{i}" for run in N_STEPS for i in (1, 2)]
    array = array.partition("_")[0]
    names = [f"smoke-stage1-{array}_{task}.log" for task in (1, 2)]
    assert sorted(path.name for path in (job.runs / "slurm").iterdir()) == names


def test_a_job_at_its_cap_ends_with_85(cluster: Cluster, data: Path) -> None:
    job = Submitted(cluster, data, "capped", "--max-requeues 0 --time 10 --launcher srun")
    job.until_midway("smoke-stage1")
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "85:0", "0"), job.log()
    assert "requeued 0 times, which is the cap" in job.log()
