"""`scripts/slurm/train.sbatch` without SLURM: stand-ins for its commands note what is asked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from llava_train.slurm import SCRIPT
from tests.slurm_stand_ins import install_stand_ins, lines
from tests.train.helpers import ROOT, TIMEOUT_S


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the stand-ins in `bin`."""
    return install_stand_ins(tmp_path)


def start_script(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """The batch script as SLURM starts it in a job of two nodes."""
    job = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    settings = {"SLURM_SUBMIT_DIR": str(folder), "LLAVA_SLURM_REPO": str(ROOT), "LLAVA_SLURM_RANKS": "4"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *(arguments or ("--config", "a.yaml"))],
        cwd=folder,
        env={"PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **settings, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_script(folder: Path, *arguments: str, **env: str) -> tuple[int, str]:
    process = start_script(folder, *arguments, **env)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said


def interrupt_script(folder: Path, number: int, **env: str) -> tuple[int, str]:
    """Runs the script until training has started, and sends it a signal."""
    process = start_script(folder, UNTIL_STOPPED="0.3", PYTHON_CODE="85", **env)
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said


def test_torchrun_gets_one_task_a_node_and_the_first_host_as_its_meeting_point(folder: Path) -> None:
    code, said = run_script(folder, "--config", "a.yaml", "b.yaml", "--set", "name=two words")
    assert code == 0, said
    (call,) = lines(folder / "srun.calls")
    assert "--nodes=2 --kill-on-bad-exit=0 --wait=60 --ntasks=2 --ntasks-per-node=1 bash -c" in call
    assert lines(folder / "python.arguments") == [
        f"{ROOT}/scripts/torchrun.py",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:20071",
        "--rdzv-id=71-0",
        f"{ROOT}/scripts/train.py",
        *("--config", "a.yaml", "b.yaml", "--set", "name=two words", "--stop-file", f"{folder}/stop-71"),
    ]
    assert {"PET_RDZV_CONF=is_host=1", "PET_LOCAL_ADDR=node1"} <= set(lines(folder / "python.environment"))
    assert "requeue" not in said.splitlines()[-1]


def test_srun_gets_one_task_a_rank_and_the_address_of_the_first(folder: Path) -> None:
    settings = {
        "LLAVA_SLURM_LAUNCHER": "srun",
        "SLURM_CPUS_PER_TASK": "3",
        "LLAVA_SLURM_SRUN_ARGS": "--mpi=none --label",
    }
    code, said = run_script(folder, **settings, RANK="7", WORLD_SIZE="9")
    assert code == 0, said
    (call,) = lines(folder / "srun.calls")
    assert call.startswith("--nodes=2 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=3 --ntasks=8 --ntasks-per-node=4 ")
    assert f"--mpi=none --label python {ROOT}/scripts/train.py --config a.yaml --stop-file {folder}/stop-71" in call
    environment = lines(folder / "python.environment")
    assert {"MASTER_ADDR=node1", "MASTER_PORT=20071", "OMP_NUM_THREADS=1"} <= set(environment)
    assert not [line for line in environment if re.match("RANK=|WORLD_SIZE=", line)]


def test_ranks_are_the_gpus_of_the_node_unless_they_are_given(folder: Path) -> None:
    run_script(folder, LLAVA_SLURM_RANKS="", SLURM_GPUS_ON_NODE="8")
    assert "--nproc-per-node=8" in lines(folder / "python.arguments")


def test_the_log_begins_with_what_runs_where(folder: Path) -> None:
    _, said = run_script(folder, SLURM_RESTART_COUNT="2")
    assert re.search(r"job 71, incarnation 2, .*, nodes node\[1-2\], torchrun, 4 ranks each", said)
    assert f", in {folder}: srun --nodes=2" in said


def test_the_setup_comes_first_and_may_read_variables_that_are_not_set(folder: Path) -> None:
    code, said = run_script(folder, LLAVA_SLURM_SETUP='echo "modules$NOT_SET"; export FROM_SETUP=yes')
    assert code == 0, said
    assert said.splitlines()[0] == "modules"
    assert "FROM_SETUP=yes" in lines(folder / "python.environment")


def test_a_setup_that_fails_starts_nothing(folder: Path) -> None:
    code, said = run_script(folder, LLAVA_SLURM_SETUP="false")
    assert code == 2
    assert "LLAVA_SLURM_SETUP failed: false" in said
    assert not (folder / "started").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LLAVA_SLURM_LAUNCHER": "mpirun"}, "LLAVA_SLURM_LAUNCHER is torchrun or srun, not mpirun"),
        ({"LLAVA_SLURM_REPO": "/nowhere"}, "no scripts/train.py in /nowhere; set LLAVA_SLURM_REPO to the checkout"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(folder: Path, settings: dict[str, str], message: str) -> None:
    code, said = run_script(folder, **settings)
    assert code == 2
    assert message in said
    assert not (folder / "started").exists()


def test_an_image_file_runs_under_apptainer(folder: Path) -> None:
    code, said = run_script(folder, LLAVA_SLURM_CONTAINER="llava.sif")
    assert code == 0, said
    (call,) = lines(folder / "apptainer.calls")
    assert call.startswith(
        f"apptainer exec --nv --bind {ROOT} --bind {folder} llava.sif python {ROOT}/scripts/torchrun.py"
    )


def test_another_image_is_given_to_pyxis_with_the_checkout_and_the_working_directory(folder: Path) -> None:
    run_script(folder, LLAVA_SLURM_CONTAINER="nvcr.io#nvidia/pytorch:25.10-py3")
    (call,) = lines(folder / "srun.calls")
    assert "--container-image=nvcr.io#nvidia/pytorch:25.10-py3" in call
    assert f"--container-mounts={ROOT}:{ROOT},{folder}:{folder} --container-workdir={folder}" in call


def test_usr1_leaves_a_stop_file_waits_for_the_save_and_requeues(folder: Path) -> None:
    code, said = interrupt_script(folder, signal.SIGUSR1)
    assert code == 85
    assert [line.removeprefix("train.sbatch: ") for line in said.splitlines()[-3:]] == [
        "SIGUSR1: ranks save at the next step",
        "exit code 85",
        "saved; requeueing",
    ]
    assert lines(folder / "scontrol.calls") == ["requeue 71"]
    assert not (folder / "stop-71").exists()


def test_sigterm_saves_too_but_whoever_sent_it_decides_whether_the_job_goes_on(folder: Path) -> None:
    code, said = interrupt_script(folder, signal.SIGTERM)
    assert code == 85
    assert "SIGTERM: ranks save at the next step" in said
    assert lines(folder / "scontrol.calls") == []


def test_a_stop_file_of_an_earlier_incarnation_stops_nothing(folder: Path) -> None:
    (folder / "stop-71").touch()
    process = start_script(folder, UNTIL_STOPPED="0", PYTHON_CODE="85")
    while not (folder / "started").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=TIMEOUT_S)


@pytest.mark.parametrize("code", [0, 1, 2, 86, 130, 137, 138, 143])
def test_other_exit_codes_are_handed_on_and_requeue_nothing(folder: Path, code: int) -> None:
    assert run_script(folder, PYTHON_CODE=str(code))[0] == code
    assert lines(folder / "scontrol.calls") == []


def test_the_cap_ends_a_job_that_is_preempted_over_and_over(folder: Path) -> None:
    settings = {"PYTHON_CODE": "85", "LLAVA_SLURM_MAX_REQUEUES": "3"}
    assert run_script(folder, SLURM_RESTART_COUNT="2", **settings)[0] == 85
    assert lines(folder / "scontrol.calls") == ["requeue 71"]
    code, said = run_script(folder, SLURM_RESTART_COUNT="3", **settings)
    assert code == 85
    assert said.splitlines()[-1].endswith(
        "requeued 3 times, which is the cap (LLAVA_SLURM_MAX_REQUEUES); submit it again to go on"
    )
    assert lines(folder / "scontrol.calls") == ["requeue 71"]


def test_a_cluster_that_does_not_requeue_is_said(folder: Path) -> None:
    code, said = run_script(folder, PYTHON_CODE="85", SCONTROL_CODE="1")
    assert code == 85
    assert said.splitlines()[-1].endswith("scontrol could not requeue the job; submit it again to go on")


def test_a_task_of_an_array_has_its_number_in_its_arguments_and_requeues_itself_alone(folder: Path) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    run_script(folder, "--config", "a.yaml", "--set", "seed={task}", "name=x-{task}-y", PYTHON_CODE="85", **task)
    arguments = lines(folder / "python.arguments")
    at = arguments.index("--set")
    assert arguments[at:] == ["--set", "seed=3", "name=x-3-y", "--stop-file", f"{folder}/stop-71", "--suffix", "3"]
    assert lines(folder / "scontrol.calls") == ["requeue 70_3"]
