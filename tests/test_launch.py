from __future__ import annotations

import os
from pathlib import Path

import pytest

from llava_train.launch import LaunchError, launch_environment

SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
SEVERAL_NODES = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[07-08]"}


def test_what_a_launcher_says_is_left_alone() -> None:
    assert launch_environment({"RANK": "3", **SRUN}) == {}


def test_one_process_is_the_whole_run() -> None:
    found = launch_environment({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("0", "0", "1")


def test_tasks_of_srun_are_ranks() -> None:
    found = launch_environment(SRUN)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("5", "1", "8")
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert found["MASTER_PORT"] == launch_environment({**SRUN, "SLURM_PROCID": "0"})["MASTER_PORT"]
    assert found["MASTER_PORT"] != launch_environment({**SRUN, "SLURM_STEP_ID": "1"})["MASTER_PORT"]


def test_the_first_host_of_several_is_asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert launch_environment(SEVERAL_NODES)["MASTER_ADDR"] == "node07"
    assert launch_environment({**SEVERAL_NODES, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"


def test_hosts_that_slurm_does_not_name_are_an_error_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match=r"node\[07-08\].* set MASTER_ADDR to the host of the first task"):
        launch_environment(SEVERAL_NODES)
