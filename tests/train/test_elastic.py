"""A run goes on with another number of ranks or another ZeRO stage: its checkpoint converts itself.

Each run is begun in one way and ended, from a copy of its folder after step 3, in another.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.train import resume
from llava_train.train.resume import Resumption
from llava_train.train.world import World
from tests.train.helpers import Outcome, read_lines, run_many, write_samples, write_stage
from tests.train.test_resume import FULL, command, results

N_STEPS, SAVED = 7, 3
LORA = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": LORA},
    "zero1": {"engine": {"zero": 1, "precision": "fp32"}, "trainable": FULL},
    "zero2": {"engine": {"zero": 2, "precision": "fp32"}, "trainable": LORA},
    "zero3": {"engine": {"zero": 3, "precision": "fp32"}, "trainable": FULL},
    "offload": {"engine": {"zero": 2, "precision": "fp32", "offload_optimizer": True}, "trainable": FULL},
    "zero1-bf16": {"engine": {"zero": 1, "precision": "bf16"}, "trainable": FULL},
    "zero3-bf16": {"engine": {"zero": 3, "precision": "bf16"}, "trainable": FULL},
}
"""Without dropout: its random numbers are drawn by rank."""
FROM_TWO_TO_ONE = [("zero0", 0), ("zero1", 1), ("offload", 2), ("zero2", 3), ("zero3-bf16", 3)]
FROM_ONE_TO_TWO = [("zero2", 2), ("zero3", 3)]
ON_TWO = [("zero3", 2), ("zero1-bf16", 3)]
"""Stage, and the ZeRO stage that it ends with: every kind of conversion in one direction."""


def begun(run: Path, target: Path) -> None:
    """A copy of a run as of an interruption after step 5; its newest checkpoint is of step 3."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("model", "adapter", "step-00000006", "step-00000007"))
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:5]))


def ended(folder: Path, begun_on: int, pairs: list[tuple[str, int]], n_ranks: int) -> dict[str, Outcome]:
    """Ends copies of the runs that `begun_on` ranks began, on `n_ranks` ranks."""
    commands: dict[str, list[Any]] = {}
    for name, zero in pairs:
        output = f"from-{begun_on}-to-{n_ranks}/zero{zero}"
        begun(folder / f"straight-{begun_on}" / name, folder / output / name)
        commands[f"{name} {zero}"] = [*command(folder, name, output), f"engine.zero={zero}"]
    return {name: outcomes[0] for name, outcomes in run_many(commands, folder, n_ranks).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_samples(folder / "data.json", "itimtittiitmi")
    for name, changes in STAGES.items():
        write_stage(
            folder / f"{name}.yaml",
            **changes,
            schedule={"max_steps": N_STEPS, "epochs": 9, "weight_decay": 0.1},
            checkpoint={"every": SAVED, "keep": 9},
        )
    begun_on_one = [name for name, _ in FROM_ONE_TO_TWO]
    run_many({name: command(folder, name, "straight-1") for name in begun_on_one}, folder, n_ranks=1)
    run_many({name: command(folder, name, "straight-2") for name in STAGES}, folder, n_ranks=2)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    on_one = ended(folder, 2, FROM_TWO_TO_ONE, n_ranks=1)
    grown, changed = ended(folder, 1, FROM_ONE_TO_TWO, n_ranks=2), ended(folder, 2, ON_TWO, n_ranks=2)
    named = {"2 to 1": on_one, "1 to 2": grown, "2 to 2": changed}
    return {f"{way}: {name}": outcome for way, found in named.items() for name, outcome in found.items()}


CASES = [
    (way, name, zero)
    for way, pairs in (("2 to 1", FROM_TWO_TO_ONE), ("1 to 2", FROM_ONE_TO_TWO), ("2 to 2", ON_TWO))
    for name, zero in pairs
]


@pytest.mark.parametrize(("way", "name", "zero"), CASES)
def test_a_run_goes_on_in_another_world_with_the_same_steps(
    way: str, name: str, zero: int, folder: Path, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[f"{way}: {name} {zero}"]
    assert outcome.code == 0, outcome.stderr
    assert f"resuming after step {SAVED} of {N_STEPS}" in outcome.stdout
    before, after = way.split(" to ")
    run, straight = folder / f"from-{before}-to-{after}/zero{zero}" / name, folder / f"straight-{before}" / name
    lines, expected = read_lines(run / "metrics.jsonl"), read_lines(straight / "metrics.jsonl")
    for key in ("step", "lr", "n_supervised", "n_bad"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    loss_tolerance, norm_tolerance = (2e-3, 3e-2) if "bf16" in name else (1e-5, 1e-4)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=loss_tolerance)
    assert [line["grad_norm"] for line in lines] == pytest.approx(
        [line["grad_norm"] for line in expected], rel=norm_tolerance
    )
    weights, wanted = results(run), results(straight)
    assert weights.keys() == wanted.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=5e-3 if "bf16" in name else 1e-4, msg=key)


@pytest.mark.parametrize(("way", "name", "zero"), [case for case in CASES if case[2]])
def test_the_log_says_that_a_checkpoint_is_converted_and_why(
    way: str, name: str, zero: int, outcomes: dict[str, Outcome]
) -> None:
    n_before, n_after = way.split(" to ")
    before = f"{n_before} rank{'s' * (n_before == '2')} with ZeRO {STAGES[name]['engine']['zero']} saved it"
    after = f"this run has {n_after} rank{'s' * (n_after == '2')} with ZeRO {zero}"
    said = outcomes[f"{way}: {name} {zero}"].stdout
    assert f"step-{SAVED:08d}: {before}, {after}; converting it with DeepSpeed's universal format" in said


def test_nothing_of_the_conversion_is_left(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes
    assert not list(folder.glob("from-*/*/*/checkpoints/.step-*"))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_after_a_conversion_each_step_count_is_a_tensor_of_its_own_on_the_device_of_its_parameter(
    zero: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed leaves them on the CPU. Parameters on `meta` stand for those on a GPU, one on the CPU for an offloaded."""
    devices = ("meta", "meta", "cpu")
    parameters = [torch.nn.Parameter(torch.empty(3, device=device)) for device in devices]
    optimizer = torch.optim.AdamW(parameters)

    def load_checkpoint(*arguments: Any, **settings: Any) -> None:
        one_for_all = torch.tensor(3.0)
        for parameter in parameters:
            step = one_for_all if zero == 3 else torch.tensor(3.0)
            optimizer.state[parameter] = {"step": step, "exp_avg": torch.zeros_like(parameter)}

    engine = SimpleNamespace(
        zero_optimization_stage=lambda: zero,
        optimizer=SimpleNamespace(param_groups=optimizer.param_groups, optimizer=optimizer),
        load_checkpoint=load_checkpoint,
    )
    monkeypatch.setattr(resume, "_convert", lambda *arguments: None)
    manifest = {"n_ranks": 2, "zero": zero}
    resume.load(engine, World(0, 1, torch.device("cpu")), Resumption(tmp_path / "step-00000003", manifest))
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [step.device.type for step in steps] == list(devices)
    assert len({id(step) for step in steps}) == len(steps)
    assert steps[-1] == 3.0
