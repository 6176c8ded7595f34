"""Invariants 5 and 6: interrupted and resumed equals uninterrupted; a checkpoint is complete or ignored.

`straight` are runs from start to end. Others start from a copy of their folder as an interruption would have left
it, or are killed for real, and end by the same command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_train.config import EngineSection
from llava_train.files import write_manifest
from llava_train.train.resume import find_resumption
from llava_train.train.world import World
from tests.train.helpers import (
    Outcome,
    ended,
    read_lines,
    run_many,
    stage_content,
    start_ranks,
    wait,
    write_samples,
    write_stage,
)

N_STEPS, EVERY, KEEP = 10, 2, 4
LORA = {
    "projector": {"lr": 1e-3, "standardize": True},
    "language_model": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
}
FULL = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}}
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": LORA},
    "zero1": {"engine": {"zero": 1, "precision": "fp32"}, "trainable": FULL},
    "zero2": {"engine": {"zero": 2, "precision": "fp32"}, "trainable": LORA},
    "zero3": {"engine": {"zero": 3, "precision": "fp32", "activation_checkpointing": True}, "trainable": LORA},
    "offload": {"engine": {"zero": 2, "precision": "fp32", "offload_optimizer": True}, "trainable": FULL},
    "zero0-bf16": {"engine": {"zero": 0, "precision": "bf16"}, "trainable": FULL},
    "zero1-bf16": {"engine": {"zero": 1, "precision": "bf16"}, "trainable": FULL},
}
"""LoRA trains with dropout: its random numbers must go on as well."""
TIED = ("zero0", "zero2")
"""Stages whose output layer is the embedding."""
KILLED_AFTER = 5


def command(folder: Path, name: str, output: str) -> list[Any]:
    return ["--config", folder / f"{name}.yaml", "--set", f"output={output}"]


def interrupted_copy(run: Path, target: Path) -> None:
    """A run folder as of an interruption after step 9: two damaged checkpoints newer than step 4, no result."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("model", "adapter", "changes.json", "step-00000010"))
    (target / "checkpoints/step-00000008/COMPLETE").unlink()
    state = next((target / "checkpoints/step-00000006").glob("*model_states.pt"))
    state.write_bytes(state.read_bytes()[:-100])
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:20])


def kill_midway(folder: Path, name: str, n_ranks: int) -> None:
    """Kills the processes of a run with `output=killed` between two checkpoints."""
    kill = [["kill_in_step", {"step": KILLED_AFTER + 1}]]
    worker = ["-m", "tests.train.fault_rank", json.dumps(dict.fromkeys(range(n_ranks), kill))]
    killed = wait(start_ranks([*worker, *command(folder, name, "killed")], folder, n_ranks), folder, grace_s=0.0)
    assert -signal.SIGKILL in killed.codes, killed.stderr
    assert len(read_lines(folder / "killed" / name / "metrics.jsonl")) == KILLED_AFTER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `straight`, `copied`, `killed` and `exported` runs of the stages are."""
    folder = tmp_path_factory.mktemp("resume")
    write_samples(folder / "data.json", "itimtittiitmi")
    for name, changes in STAGES.items():
        model = stage_content()["model"]
        model["language_model"]["config"]["tie_word_embeddings"] = name in TIED
        write_stage(
            folder / f"{name}.yaml",
            **changes,
            model=model,
            schedule={"max_steps": N_STEPS, "epochs": 9, "weight_decay": 0.1},
            checkpoint={"every": EVERY, "keep": KEEP},
            loader={"workers": 1},
        )
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[str, list[Outcome]]:
    straight = run_many({name: command(folder, name, "straight") for name in STAGES}, folder, n_ranks=2)
    assert not any(outcome.code for outcomes in straight.values() for outcome in outcomes), straight
    kill_midway(folder, "zero2", n_ranks=2)
    for name in STAGES:
        interrupted_copy(folder / "straight" / name, folder / "copied" / name)
    for name in ("zero0", "zero3"):
        ignored = shutil.ignore_patterns("model", "adapter", "changes.json")
        shutil.copytree(folder / "straight" / name, folder / "exported" / name, ignore=ignored)
    resumed = {f"copied/{name}": command(folder, name, "copied") for name in STAGES}
    resumed |= {f"exported/{name}": command(folder, name, "exported") for name in ("zero0", "zero3")}
    return run_many({**resumed, "killed/zero2": command(folder, "zero2", "killed")}, folder, n_ranks=2)


@pytest.fixture(scope="module")
def on_one_rank(folder: Path, on_two_ranks: dict[str, list[Outcome]]) -> dict[str, list[Outcome]]:
    """The same in one process, and the two ranks' runs continued by one."""
    kill_midway(folder, "zero0", n_ranks=1)
    interrupted_copy(folder / "straight/zero0", folder / "fewer/zero0")
    interrupted_copy(folder / "straight/zero0", folder / "fewer-again/zero0")
    commands = {
        "alone/zero0": command(folder, "zero0", "alone"),
        "killed/zero0": command(folder, "zero0", "killed"),
        "fewer/zero0": command(folder, "zero0", "fewer"),
        "zero 2": [*command(folder, "zero0", "fewer-again"), "engine.zero=2"],
        "bf16": [*command(folder, "zero0", "fewer-again"), "engine.precision=bf16"],
    }
    return run_many(commands, folder)


def results(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "model/model.safetensors")
    if (run / "adapter").exists():
        tensors |= load_file(run / "adapter/adapter_model.safetensors")
    return tensors


def assert_same_run(run: Path, straight: Path) -> None:
    """Every logged loss and every weight, bit for bit."""
    ours, expected = read_lines(run / "metrics.jsonl"), read_lines(straight / "metrics.jsonl")
    for key in ("step", "loss", "grad_norm", "grad_norms", "lr", "n_supervised", "sample_lengths", "pack_fill"):
        assert [line[key] for line in ours] == [line[key] for line in expected], key
    weights, straight_weights = results(run), results(straight)
    assert weights.keys() == straight_weights.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, straight_weights[name])] == []


@pytest.mark.parametrize("name", STAGES)
def test_resumed_equals_uninterrupted_bit_by_bit(
    name: str, folder: Path, on_two_ranks: dict[str, list[Outcome]]
) -> None:
    outcome = on_two_ranks[f"copied/{name}"][0]
    assert outcome.code == 0, outcome.stderr
    assert "resuming after step 4 of 10" in outcome.stdout
    assert [line["step"] for line in read_lines(folder / "copied" / name / "metrics.jsonl")] == list(range(1, 11))
    assert_same_run(folder / "copied" / name, folder / "straight" / name)


@pytest.mark.parametrize("name", STAGES)
def test_checkpoints_that_are_not_complete_are_passed_over_and_named(
    name: str, on_two_ranks: dict[str, list[Outcome]]
) -> None:
    said = on_two_ranks[f"copied/{name}"][0].stdout
    assert f"passed over copied/{name}/checkpoints/step-00000008: no readable COMPLETE manifest" in said
    assert f"passed over copied/{name}/checkpoints/step-00000006: " in said
    assert "model_states.pt has" in said


def test_two_killed_ranks_resume_to_the_same_end(folder: Path, on_two_ranks: dict[str, list[Outcome]]) -> None:
    outcome = on_two_ranks["killed/zero2"][0]
    assert outcome.code == 0, outcome.stderr
    assert any(f"resuming after step {step} of 10" in outcome.stdout for step in (4, 6, 8)), outcome.stdout
    assert_same_run(folder / "killed/zero2", folder / "straight/zero2")


def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    metrics = folder / "interrupted/zero0/metrics.jsonl"
    waits = json.dumps({0: [["pause", {"step": 2, "until": "never"}]]})
    processes = start_ranks(["-m", "tests.train.fault_rank", waits, *command(folder, "zero0", "interrupted")], folder)
    while not metrics.is_file():
        assert all(process.exitcode is None for process in processes), ended(processes, folder)
        time.sleep(0.02)
    os.killpg(processes[0].pid, signal.SIGINT)  # a terminal signals the loader's workers too
    finished = wait(processes, folder)
    assert finished.codes == [130]
    place = "newest checkpoint" if any(metrics.parent.glob("checkpoints/step-*")) else "beginning"
    assert finished.stderr[0].splitlines()[-1] == f"interrupted; the same command goes on from the {place}"
    assert "Traceback" not in finished.stderr[0]


def test_a_killed_process_resumes_to_the_same_end(folder: Path, on_one_rank: dict[str, list[Outcome]]) -> None:
    outcome = on_one_rank["killed/zero0"][0]
    assert outcome.code == 0, outcome.stderr
    assert any(f"resuming after step {step} of 10" in outcome.stdout for step in (4, 6, 8)), outcome.stdout
    assert_same_run(folder / "killed/zero0", folder / "alone/zero0")


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_a_run_that_ended_before_its_result_was_written_only_writes_it(
    name: str, folder: Path, on_two_ranks: dict[str, list[Outcome]]
) -> None:
    outcome = on_two_ranks[f"exported/{name}"][0]
    assert outcome.code == 0, outcome.stderr
    assert "resuming after step 10 of 10" in outcome.stdout
    assert_same_run(folder / "exported" / name, folder / "straight" / name)


def test_without_zero_a_run_goes_on_with_fewer_ranks(folder: Path, on_one_rank: dict[str, list[Outcome]]) -> None:
    outcome = on_one_rank["fewer/zero0"][0]
    assert outcome.code == 0, outcome.stderr
    assert "resuming after step 4 of 10" in outcome.stdout
    assert [line["step"] for line in read_lines(folder / "fewer/zero0/metrics.jsonl")] == list(range(1, 11))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero 2", "was saved with engine.zero: 0, this run has 2; go on with --set engine.zero=0"),
        ("bf16", "was saved with engine.precision: fp32, this run has bf16; go on with --set engine.precision=fp32"),
    ],
)
def test_a_checkpoint_of_another_engine_is_refused_with_the_value_to_use(
    name: str, message: str, on_one_rank: dict[str, list[Outcome]]
) -> None:
    outcome = on_one_rank[name][0]
    assert outcome.code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_only_the_newest_checkpoints_are_kept(folder: Path, on_two_ranks: dict[str, list[Outcome]]) -> None:
    for run in ("straight/zero1", "copied/zero3", "killed/zero2"):
        names = sorted(path.name for path in (folder / run / "checkpoints").glob("step-*"))
        assert names == [f"step-{step:08d}" for step in (4, 6, 8, 10)], run


@pytest.mark.parametrize("name", STAGES)
def test_checkpoints_hold_only_what_trains(name: str, folder: Path, on_two_ranks: dict[str, list[Outcome]]) -> None:
    checkpoint = folder / "straight" / name / "checkpoints/step-00000010"
    for path in checkpoint.glob("*model_states.pt"):
        names = torch.load(path, weights_only=False)["module"].keys()
        assert not any("vision_tower" in name for name in names)
        if STAGES[name]["trainable"] is LORA:
            assert all("lora_" in name or "multi_modal_projector" in name for name in names)


def test_the_newest_complete_checkpoint_is_found_whatever_lies_beside_it(tmp_path: Path) -> None:
    def newest() -> tuple[Path | None, list[str]]:
        found = find_resumption(World(0, 1, torch.device("cpu")), tmp_path, EngineSection(zero=0, precision="fp32"))
        return found.checkpoint, [line.split(": ")[1] for line in found.passed_over]

    assert newest() == (None, [])
    for step in (5, 50, 100, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "state.pt").write_bytes(bytes(100))
        write_manifest(tmp_path / f"step-{step:08d}", step=step, n_ranks=1, zero=0, precision="fp32")
    (tmp_path / ".step-00000200.saving").mkdir()
    assert newest() == (tmp_path / "step-00000100", [])
    (tmp_path / "step-00000100/state.pt").write_bytes(bytes(99) + b"x")
    (tmp_path / "step-00000050/state.pt").unlink()
    assert newest() == (tmp_path / "step-00000009", ["state.pt has another checksum", "state.pt is missing"])
    (tmp_path / "step-00000009/COMPLETE").write_text('{"step": 9, "fi')
    assert newest()[0] == tmp_path / "step-00000005"
