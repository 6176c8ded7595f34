"""`llava-train slurm` without SLURM: a stand-in for `sbatch` notes what is asked."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_train import slurm as slurm_module
from llava_train.cli import app
from llava_train.many_values import repeat_flags
from llava_train.slurm import SCRIPT, Job, Launcher, SubmitError, array_tasks, prepare
from tests.slurm_stand_ins import install_stand_ins, lines
from tests.train.helpers import ROOT

STAGE1, STAGE2 = (str(ROOT / f"configs/smoke/{name}.yaml") for name in ("stage1", "stage2"))
TWO_STAGES = ["--config", STAGE1, STAGE2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the stand-ins in `bin`."""
    return install_stand_ins(tmp_path)


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["slurm", *arguments])
    return done.exit_code, done.output


def option(command: list[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in command if word.startswith(f"--{name}=")), None)


def test_the_line_of_the_readme_becomes_one_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = invoke(*TWO_STAGES, "--nodes", "4", "--gpus", "8", "--time", "24:00:00", "--dry-run")
    assert code == 0, said
    words = shlex.split(said.splitlines()[0])
    at = words.index("sbatch")
    assert f"LLAVA_SLURM_SETUP=source {sys.prefix}/bin/activate" in words[:at]
    assert {"LLAVA_SLURM_LAUNCHER=torchrun", "LLAVA_SLURM_RANKS=8", f"LLAVA_SLURM_REPO={ROOT}"} <= set(words[:at])
    command = words[at:]
    assert [option(command, name) for name in ("nodes", "gpus-per-node", "time")] == ["4", "8", "24:00:00"]
    assert option(command, "signal") == "B:USR1@120"
    assert command[-4:] == [str(SCRIPT), "--config", STAGE1, STAGE2]
    assert said.endswith(SCRIPT.read_text() + "\n")
    assert list(tmp_path.iterdir()) == []


def test_every_task_of_srun_gets_the_cpus_of_a_rank_and_torchrun_those_of_all() -> None:
    of_srun = prepare(Job(gpus=4, cpus_per_rank=6, launcher=Launcher.srun), [STAGE1]).command
    assert (option(of_srun, "ntasks-per-node"), option(of_srun, "cpus-per-task")) == ("4", "6")
    of_torchrun = prepare(Job(gpus=4, cpus_per_rank=6), [STAGE1]).command
    assert (option(of_torchrun, "ntasks-per-node"), option(of_torchrun, "cpus-per-task")) == ("1", "24")
    by_default = prepare(Job(ranks_per_node=2), [STAGE1], ["loader.workers=3"]).command
    assert (option(by_default, "cpus-per-task"), option(by_default, "gpus-per-node")) == ("8", None)


def test_options_of_the_cluster_are_handed_on_and_nothing_else_is_asked() -> None:
    asked = "--partition gpu --account me --qos high --job-name x --signal-before 300 --sbatch-arg=--exclusive"
    code, said = invoke("--config", STAGE1, *asked.split(), "--max-requeues", "5", "--srun-arg=--mpi=none", "--dry-run")
    assert code == 0, said
    words = shlex.split(said.splitlines()[0])
    wanted = "--partition=gpu --account=me --qos=high --job-name=x --signal=B:USR1@300 --exclusive"
    assert set(wanted.split()) <= set(words)
    assert {"LLAVA_SLURM_MAX_REQUEUES=5", "LLAVA_SLURM_SRUN_ARGS=--mpi=none"} <= set(words)
    plain = prepare(Job(), [STAGE1]).command
    assert not [word for word in plain if re.match("--(partition|account|qos|gpus|time|array)", word)]


def test_a_container_brings_its_own_environment() -> None:
    settings = prepare(Job(container="llava.sif"), [STAGE1]).environment
    assert settings["LLAVA_SLURM_CONTAINER"] == "llava.sif"
    assert "LLAVA_SLURM_SETUP" not in settings
    settings = prepare(Job(container="llava.sif", setup="module load apptainer"), [STAGE1]).environment
    assert settings["LLAVA_SLURM_SETUP"] == "module load apptainer"


def test_tasks_of_an_array_are_checked_and_keep_apart() -> None:
    submission = prepare(Job(array="1,4-6:2%1"), [STAGE1, STAGE2], ["seed={task}"])
    assert [str(run) for run in submission.runs] == [
        f"runs/smoke-{stage}-{task}" for task in (1, 4, 6) for stage in ("stage1", "stage2")
    ]
    assert submission.command[-2:] == ["--set", "seed={task}"]
    assert option(submission.command, "array") == "1,4-6:2%1"
    assert (submission.name, submission.log.name) == ("smoke-stage1", "%x-%A_%a.log")


@pytest.mark.parametrize("array", ["", "x", "3-1", "1-2:0", "1,,2", "-1"])
def test_an_array_that_slurm_would_not_understand_is_refused(array: str) -> None:
    with pytest.raises(SubmitError, match="--array"):
        array_tasks(array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", STAGE1, "--set", "batch.sise=3"], "did you mean size?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot read the stage file"),
        (["--config", STAGE1, STAGE1], "two stages share a run folder"),
        (["--config", STAGE1, "--set", "seed={task}"], "add --array"),
        (["--config", STAGE1, "--array", "0-3", "--set", "batch.size={task}"], "batch.size"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    code, said = invoke(*arguments)
    assert code == 2
    assert message in said
    assert not (folder / "sbatch.arguments").exists()


def test_a_submitted_job_is_named_with_its_log_runs_and_how_to_stop_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    code, said = invoke(*TWO_STAGES, "--set", "output=out", "seed=3", "--setup", "module load cuda; true")
    assert code == 0, said
    assert said.splitlines()[:4] == [
        "job 71",
        f"log: {folder}/out/slurm/smoke-stage1-71.log",
        "run folders: out/smoke-stage1, out/smoke-stage2",
        f"follow: tail -F {folder}/out/slurm/smoke-stage1-71.log",
    ]
    assert "scancel --signal=USR1 --batch 71" in said
    assert (folder / "out/slurm").is_dir()
    assert "LLAVA_SLURM_SETUP=module load cuda; true" in lines(folder / "sbatch.environment")
    assert lines(folder / "sbatch.arguments")[-3:] == ["--set", "output=out", "seed=3"]


def test_without_sbatch_the_command_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = invoke("--config", STAGE1)
    assert code == 2
    assert "sbatch is not on the PATH" in said


def test_what_sbatch_says_when_it_refuses_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_CODE", "1")
    monkeypatch.setenv("SBATCH_COMPLAINS", "sbatch: error: invalid partition specified: gpus")
    code, said = invoke("--config", STAGE1, "--partition", "gpus")
    assert code == 2
    assert "sbatch refused the job: sbatch: error: invalid partition specified: gpus" in said


def test_a_python_without_a_virtual_environment_is_found_by_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_module.sys, "prefix", str(tmp_path))
    folder = shlex.quote(str(Path(sys.executable).parent))
    assert slurm_module.this_environment() == f"export PATH={folder}:$PATH"


def test_flags_are_repeated_up_to_the_next_option() -> None:
    said = "x --config a b --nodes 4 y --set p=1 q=-2 --config c -v d"
    repeated = " ".join(repeat_flags(said.split(), ["--config", "--set"]))
    assert repeated == "x --config a --config b --nodes 4 y --set p=1 --set q=-2 --config c -v d"
    assert list(repeat_flags(["--config=a", "b"], ["--config"])) == ["--config=a", "b"]
