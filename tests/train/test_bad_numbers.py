"""A step whose loss or gradient is not finite is not taken, and is recorded with its samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import Finished, read_lines, run_ranks, write_samples, write_stage
from tests.train.test_resume import results

N_STEPS = 7
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"engine": {"zero": 0, "precision": "fp32"}},
    "zero2": {"engine": {"zero": 2, "precision": "fp32"}},
    "zero3": {"engine": {"zero": 3, "precision": "fp32"}},
    "zero0-bf16": {"engine": {"zero": 0, "precision": "bf16"}},
    "zero1-bf16": {"engine": {"zero": 1, "precision": "bf16"}},
    "no-clip": {"engine": {"zero": 1, "precision": "fp32"}, "schedule": {"clip": None}},
}
FULL = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    write_samples(folder / "data.json", "itimtittiitmi")
    for name, changes in STAGES.items():
        schedule = {"max_steps": N_STEPS, "epochs": 9, **changes.get("schedule", {})}
        write_stage(
            folder / f"{name}.yaml",
            **{"trainable": FULL, "checkpoint": {"every": 1, "keep": 9}, **changes, "schedule": schedule},
        )
    return folder


def run(folder: Path, name: str, faults: dict[int, str], output: str, n_ranks: int, *more: str) -> Finished:
    """Trains with faults, one call after another: the environment of the ranks says which."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", json.dumps(faults))
        overrides = ["--set", f"output={output}", *more]
        return run_ranks(
            ["-m", "tests.train.numbers_worker", "--config", folder / f"{name}.yaml", *overrides], folder, n_ranks
        )


@pytest.mark.parametrize("name", STAGES)
def test_bad_steps_are_skipped_counted_and_recorded_with_their_samples(name: str, folder: Path) -> None:
    faults = {2: "nan", 3: "inf", 5: "gradient"}
    n_ranks = 2 if name in ("zero2", "zero3") else 1
    finished = run(folder, name, faults, "some", n_ranks).check()
    run_dir = folder / "some" / name
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, N_STEPS + 1))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in (2, 3) for step in range(1, N_STEPS + 1)]
    assert [line["grad_norm"] is None for line in lines] == [step in faults for step in range(1, N_STEPS + 1)]
    bad = read_lines(run_dir / "bad_steps.jsonl")
    assert [record["step"] for record in bad] == list(faults)
    for record in bad:
        assert len(record["samples"]) == 4
        assert all(sample["source"] == "data.json" and sample["id"].startswith("data-") for sample in record["samples"])
    assert "step 3 is skipped: its loss (inf) or gradient norm (" in finished.stdout[0]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in range(1, N_STEPS + 1) if step not in faults]
    assert all(tensor.isfinite().all() for tensor in results(run_dir).values())


def test_a_skipped_step_changes_no_weight(folder: Path) -> None:
    """A run whose last three steps are bad ends with the weights of the one that ends before them."""
    short = run(folder, "zero0", {}, "short", 1, "schedule.lr=constant", "schedule.max_steps=4").check()
    bad = run(folder, "zero0", {5: "nan", 6: "inf"}, "bad", 1, "schedule.lr=constant", "schedule.max_steps=6").check()
    assert short.codes == bad.codes == [0]
    ended, wanted = results(folder / "bad/zero0"), results(folder / "short/zero0")
    assert all(ended[key].equal(wanted[key]) for key in wanted)


def test_three_bad_steps_in_a_row_stop_the_run_before_harm_is_saved(folder: Path) -> None:
    finished = run(folder, "zero2", {5: "nan", 6: "gradient", 7: "inf"}, "stopped", 2)
    assert finished.codes == [2, 2]
    message = finished.stderr[0].splitlines()[-1]
    assert message.startswith(
        "error: max_bad_steps: 3 steps in a row, up to step 7, had a loss or gradient that is not"
    )
    assert "stopped/zero2/bad_steps.jsonl" in message
    assert message.endswith("The same command goes on after step 4")
    assert sorted(path.name for path in (folder / "stopped/zero2/checkpoints").iterdir())[-1] == "step-00000004"
    assert not (folder / "stopped/zero2/model").exists()
    again = run(folder, "zero2", {}, "stopped", 2).check()  # as after mending the data
    assert "resuming after step 4 of 7" in again.stdout[0]
    assert (folder / "stopped/zero2/bad_steps.jsonl").read_text() == ""


def test_max_bad_steps_is_a_key(folder: Path) -> None:
    assert run(folder, "zero0", {2: "nan"}, "one", 1, "max_bad_steps=1").codes == [2]


def test_weights_that_are_not_finite_are_never_saved(folder: Path) -> None:
    finished = run(folder, "zero0", {3: "weights"}, "ruined", 1)
    assert finished.codes == [2]
    assert "step 3: trained weights are not finite (inf or nan), so nothing is saved" in finished.stderr[0]
    assert sorted(path.name for path in (folder / "ruined/zero0/checkpoints").iterdir())[-1] == "step-00000002"
