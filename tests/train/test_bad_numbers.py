"""A step whose loss or gradient is not finite is not taken, and is recorded with its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_train.train.lines import StepLine
from tests.train.helpers import Outcome, read_lines, run_many, write_samples, write_stage
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


ON_TWO_RANKS = ("zero2", "zero3")
CONSTANT = ["schedule.lr=constant"]
ONE_RANK: dict[str, list[str]] = {
    **{f"some {name}": [name, "some.2-nan.3-inf.5-gradient"] for name in STAGES if name not in ON_TWO_RANKS},
    "short": ["zero0", "short", *CONSTANT, "schedule.max_steps=4"],
    "bad end": ["zero0", "end.5-nan.6-inf", *CONSTANT, "schedule.max_steps=6"],
    "none": ["zero0", "none.1-nan.2-inf", *CONSTANT, "schedule.max_steps=2"],
    "one": ["zero0", "one.2-nan", "max_bad_steps=1"],
    "ruined": ["zero0", "ruined.3-weights"],
}
TWO_RANKS: dict[str, list[str]] = {
    **{f"some {name}": [name, "some.2-nan.3-inf.5-gradient"] for name in ON_TWO_RANKS},
    "stopped": ["zero2", "stopped.5-nan.6-gradient.7-inf"],
}


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """What rank 0 said, and the highest exit code of the ranks."""
    found = {}
    for n_ranks, runs in ((1, ONE_RANK), (2, TWO_RANKS)):
        commands = {
            what: ["--config", folder / f"{name}.yaml", "--set", f"output={output}", *more]
            for what, (name, output, *more) in runs.items()
        }
        for what, of_ranks in run_many(commands, folder, n_ranks, "tests.train.numbers_worker").items():
            assert len({outcome.code for outcome in of_ranks}) == 1, "all ranks agree"
            found[what] = of_ranks[0]
    return found


@pytest.mark.parametrize("name", STAGES)
def test_bad_steps_are_skipped_counted_and_recorded_with_their_samples(
    name: str, folder: Path, outcomes: dict[str, Outcome]
) -> None:
    assert outcomes[f"some {name}"].code == 0, outcomes[f"some {name}"].stderr
    run_dir, bad_steps = folder / "some.2-nan.3-inf.5-gradient" / name, (2, 3, 5)
    lines, steps = read_lines(run_dir / "metrics.jsonl"), range(1, N_STEPS + 1)
    assert [StepLine.model_validate(line).step for line in lines] == list(steps)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in (2, 3) for step in steps]
    assert [line["grad_norm"] is None for line in lines] == [step in bad_steps for step in steps]
    assert [set(line["grad_norms"].values()) == {None} for line in lines] == [step in bad_steps for step in steps]
    bad = read_lines(run_dir / "bad_steps.jsonl")
    assert [record["step"] for record in bad] == list(bad_steps)
    for record in bad:
        assert len(record["samples"]) == 4
        assert all(sample["source"] == "data.json" and sample["id"].startswith("data-") for sample in record["samples"])
    assert "step 3 is skipped: its loss (inf) or gradient norm (" in outcomes[f"some {name}"].stdout
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in steps if step not in bad_steps]
    assert all(tensor.isfinite().all() for tensor in results(run_dir).values())


def test_a_skipped_step_changes_no_weight(folder: Path, outcomes: dict[str, Outcome]) -> None:
    """A run whose last two steps are bad ends with the weights of the one that ends before them."""
    assert outcomes["short"].code == outcomes["bad end"].code == 0
    ended, wanted = results(folder / "end.5-nan.6-inf/zero0"), results(folder / "short/zero0")
    assert all(ended[key].equal(wanted[key]) for key in wanted)


def test_three_bad_steps_in_a_row_stop_the_run_before_harm_is_saved(folder: Path, outcomes: dict[str, Outcome]) -> None:
    run_dir = folder / "stopped.5-nan.6-gradient.7-inf/zero2"
    assert outcomes["stopped"].code == 2
    message = outcomes["stopped"].stderr.splitlines()[-1]
    assert message.startswith(
        "error: max_bad_steps: 3 steps in a row, up to step 7, had a loss or gradient that is not"
    )
    assert "zero2/bad_steps.jsonl" in message
    assert message.endswith("The same command goes on after step 4")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-1] == "step-00000004"
    assert not (run_dir / "model").exists()
    run_dir.parent.rename(folder / "mended")
    command = ["--config", folder / "zero2.yaml", "--set", "output=mended"]
    again = run_many({"again": command}, folder, 2)["again"][0]
    assert again.code == 0, again.stderr
    assert "resuming after step 4 of 7" in again.stdout
    assert (folder / "mended/zero2/bad_steps.jsonl").read_text() == ""


def test_a_run_that_takes_no_step_writes_no_result(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["none"].code == 2
    words = "nothing was trained in 2 steps (8 samples): 2 steps had a loss or gradient that is not finite"
    assert words in outcomes["none"].stderr
    assert not (folder / "none.1-nan.2-inf/zero0/model").exists()
    assert [record["step"] for record in read_lines(folder / "none.1-nan.2-inf/zero0/bad_steps.jsonl")] == [1, 2]


def test_max_bad_steps_is_a_key(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["one"].code == 2
    assert "1 steps in a row, up to step 2" in outcomes["one"].stderr


def test_weights_that_are_not_finite_are_never_saved(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["ruined"].code == 2
    assert "step 3: trained weights are not finite (inf or nan), so nothing is saved" in outcomes["ruined"].stderr
    saved = sorted(path.name for path in (folder / "ruined.3-weights/zero0/checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002"]
