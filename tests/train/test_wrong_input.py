"""What a user may do wrong is refused before it costs anything, in words that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import TRAIN, Outcome, environment, run_many, write_samples, write_stage

MISSING_DATA = {"data": [{"path": "no/such.json"}]}
REFUSALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wrong-key": ({"optimiser": "adam"}, ["wrong-key.yaml: optimiser: unknown key", "allowed here: "]),
    "near-key": ({"lodger": {"workers": 0}}, ["near-key.yaml: lodger: unknown key", "did you mean loader?"]),
    "deepspeed-conflict": (
        {"engine": {"zero": 2, "precision": "fp32", "deepspeed": "ds.json"}},
        ["deepspeed-conflict.yaml", "zero_optimization.stage (3) conflicts with engine.zero", "(2)", "remove it"],
    ),
    "missing-data": (MISSING_DATA, ["no/such.json: cannot read the data file"]),
    "missing-data-before-model": (
        {**MISSING_DATA, "model": {"language_model": "no/lm", "vision_tower": "no/vt", "chat_template": "vicuna_v1"}},
        ["no/such.json: cannot read the data file"],
    ),
    "missing-held-out": ({"eval": {"every": 1, **MISSING_DATA}}, ["no/such.json: cannot read the data file"]),
    "missing-init": (
        {"init_from": "runs/never-trained"},
        ["init_from: there is no run runs/never-trained", "run that stage to its end first"],
    ),
    "missing-name": (
        {"init_from": "never-trained"},
        [
            "init_from: there is no run never-trained in runs, and no such file or folder in ",
            "run that stage to its end",
        ],
    ),
    "run-in-another-output": (
        {"init_from": "runs/begun", "output": "X"},
        ["init_from: there is no runs/begun, but a run begun in X; write `init_from: begun`"],
    ),
    "unfinished-name": (
        {"init_from": "begun", "output": "X"},
        ["init_from: X/begun holds no finished result", "run that stage to its end first"],
    ),
    "unfinished-init": (
        {"init_from": "unfinished"},
        ["init_from: unfinished holds no finished result", "run that stage"],
    ),
    "no-picture": (
        {"trainable": {"projector": {"lr": 1e-3, "standardize": True}}, "data": [{"path": "texts.json"}]},
        [
            "none of the 3 samples that were looked at has a picture, so the projector would learn nothing",
            "remove trainable.projector",
        ],
    ),
    "too-long": (
        {
            "trainable": {"projector": {"lr": 1e-3, "standardize": True}},
            "batch": {"size": 2, "max_tokens": 9, "max_sample_tokens": 9},
        },
        [
            "trainable.projector.standardize: the first 16 steps have no sample with a picture that can be trained on",
            "more than batch.max_sample_tokens (9)",
        ],
    ),
    "missing-part": (
        {"model": {"language_model": "no/lm", "vision_tower": "no/vt", "chat_template": "vicuna_v1"}},
        ["model.language_model: cannot load no/lm"],
    ),
}
NOT_JUST_RUN = ("wrong-key", "near-key", "deepspeed-conflict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    write_samples(folder / "data.json", "itit")
    write_samples(folder / "texts.json", "ttt")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (folder / "unfinished/checkpoints").mkdir(parents=True)
    (folder / "X/begun/checkpoints").mkdir(parents=True)
    (folder / "unfinished/config.yaml").write_text("name: unfinished\n")
    for name, (changes, _) in REFUSALS.items():
        write_stage(folder / f"{name}.yaml", **changes)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    commands = {name: ["--config", f"{name}.yaml"] for name in REFUSALS}
    return {name: outcomes[0] for name, outcomes in run_many(commands, folder).items()}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_message_that_helps(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].code == 2
    for words in REFUSALS[name][1]:
        assert words in outcomes[name].stderr
    assert outcomes[name].stderr.count("error: ") == 1
    assert "Traceback" not in outcomes[name].stderr
    assert "run folder" not in outcomes[name].stdout, "no run began"


def test_nothing_is_left_behind(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert [path.name for path in (folder / "runs").iterdir()] == [".cache"]


def test_a_wrong_second_stage_is_refused_before_the_first_one_runs(folder: Path) -> None:
    """By a process of its own, and quickly: nothing heavy is imported for it."""
    first = write_stage(folder / "right.yaml")
    command = [sys.executable, "-X", "importtime", TRAIN, "--config", first, folder / "near-key.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean loader?" in done.stderr
    assert not any(line.endswith(("| torch", "| deepspeed")) for line in done.stderr.splitlines())
    assert not (folder / "runs/right").exists()


def test_two_stages_of_one_name_are_refused(folder: Path) -> None:
    stage = write_stage(folder / "right.yaml")
    command = [sys.executable, TRAIN, "--config", stage, stage]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "two stages share a run folder: runs/right, runs/right" in done.stderr
