from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from transformers.utils.import_utils import is_env_variable_true

from llava_train.failures.words import Context
from llava_train.last_words import speaks
from llava_train.launch import LaunchError, check_gpus, launch_environment, note_on_launch, set_for_libraries

SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
BY_TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node07", "MASTER_PORT": "29500"}
SEVERAL_NODES = {**SRUN, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[07-08]"}


def test_what_a_launcher_says_is_left_alone() -> None:
    assert launch_environment({**BY_TORCHRUN, **SRUN}) == {}


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


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, r"RANK is set \(0\), .* LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not: .* torchrun"),
        ({**BY_TORCHRUN, "WORLD_SIZE": "2"}, "RANK is 3, but WORLD_SIZE 2: ranks count from 0"),
        ({**BY_TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes were started by mpirun .* each would train the whole run"),
        ({"PMI_SIZE": "2"}, "2 processes were started by mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun started 2 tasks, and SLURM_LOCALID of this one"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "srun started 2 tasks, and SLURM_STEP_NUM_TASKS is not set"),
    ],
)
def test_a_wrong_launcher_is_refused_with_a_right_one(environment: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        launch_environment(environment)


def test_a_batch_script_of_several_tasks_may_run_one_process() -> None:
    assert launch_environment({"SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("local_size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_more_processes_than_gpus_are_refused_on_all_ranks_of_a_machine_and_said_once(local_size: str) -> None:
    check_gpus({"LOCAL_RANK": "1", local_size: "2"}, n_gpus=2)
    said = []
    for local_rank in range(4):
        with pytest.raises(LaunchError, match=r"4 and 2 .* --nproc_per_node 2 .*--gpus-per-node") as caught:
            check_gpus({"LOCAL_RANK": str(local_rank), local_size: "4"}, n_gpus=2)
        said.append(speaks(caught.value, Context(rank=8 + local_rank, n_ranks=12, local_rank=local_rank)))
    assert said == [True, False, False, False]


def test_without_gpus_any_number_of_processes_may_train() -> None:
    check_gpus({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, n_gpus=0)


def test_one_process_beside_several_gpus_is_noted_unless_a_launcher_meant_it() -> None:
    alone = launch_environment({})
    assert "torchrun --standalone --nproc_per_node 8" in str(note_on_launch({}, alone, n_gpus=8))
    assert note_on_launch({}, alone, n_gpus=1) is None
    assert note_on_launch(BY_TORCHRUN, {}, n_gpus=8) is None
    assert note_on_launch({"SLURM_STEP_NUM_TASKS": "1"}, alone, n_gpus=8) is None


def test_segments_of_gpu_memory_grow_unless_the_user_sets_the_allocator_himself() -> None:
    environment: dict[str, str] = {}
    set_for_libraries(environment)
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        for value in ("max_split_size_mb:512", ""):
            environment = {name: value}
            set_for_libraries(environment)
            assert {key: environment[key] for key in environment if "ALLOC" in key} == {name: value}


def test_torch_reads_the_allocators_settings_when_it_is_imported_before_they_are_set() -> None:
    program = (
        "import os, torch; from llava_train.launch import set_for_libraries; set_for_libraries(os.environ); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "expandable_segments:True\n"


def test_no_rank_asks_the_hub_to_convert_a_model_unless_the_user_wants_it() -> None:
    environment: dict[str, str] = {}
    set_for_libraries(environment)
    with mock.patch.dict(os.environ, environment):
        assert is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")
    environment = {"DISABLE_SAFETENSORS_CONVERSION": "0"}
    set_for_libraries(environment)
    assert environment["DISABLE_SAFETENSORS_CONVERSION"] == "0"
