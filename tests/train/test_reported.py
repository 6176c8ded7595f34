"""A run shows its questions before training, and leaves a report however it ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_train.files import sha256
from llava_train.report.read import read_run
from tests.train.helpers import Outcome, read_lines, run_many, write_samples, write_stage

NAMES = ("run", "unwritable", "stops", "no-eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    write_samples(folder / "data.json", "itititit")
    write_samples(folder / "bad.json", "it" * 11 + "xt")
    write_samples(folder / "held-out.json", "xtimi", seed=1)
    large = Image.new("RGB", (900, 300), "blue")
    large.save(folder / "images/held-out-2-0.png")
    shown = {"every": 2, "data": [{"path": "held-out.json"}], "generate": 3, "max_new_tokens": 3}
    changes: dict[str, dict[str, Any]] = {
        "stops": {"data": [{"path": "bad.json"}], "on_bad_sample": "error", "eval": None},
        "no-eval": {"eval": None, "schedule": {"max_steps": 40}},
    }
    for name in NAMES:
        settings = {"on_bad_sample": "skip", "eval": shown, "logging": {"every": 1}, **changes.get(name, {})}
        write_stage(folder / f"{name}.yaml", **settings)
    (folder / "stop").touch()
    (folder / "runs/unwritable/report.html").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Outcome]:
    """`run` is stopped before its first step and goes on, `no-eval` is passed over when it comes again."""
    outcomes = run_many(
        {"asked to stop": ["--config", "run.yaml", "--stop-file", "stop"], "complete": ["--config", "no-eval.yaml"]},
        folder,
    )
    (folder / "runs/run/report.html").rename(folder / "stopped.html")
    (folder / "runs/no-eval/report.html").rename(folder / "complete.html")
    outcomes |= run_many({name: ["--config", f"{name}.yaml"] for name in NAMES}, folder)
    return {name: ranks[0] for name, ranks in outcomes.items()}


def test_a_run_that_begins_anew_evaluates_before_its_first_step_once(folder: Path, done: dict[str, Outcome]) -> None:
    assert (done["asked to stop"].code, done["run"].code) == (85, 0), done["run"].stderr
    assert "evaluating before the first step" in done["run"].stdout
    assert ", evaluation " in next(line for line in done["run"].stdout.splitlines() if "first step after" in line)
    lines = read_lines(folder / "runs/run/metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2]
    answers = read_lines(folder / "runs/run/answers.jsonl")
    assert [line["step"] for line in answers] == [0, 0, 0, 2, 2, 2]


def test_the_start_says_what_a_pack_can_be_and_that_max_steps_is_not_reached(done: dict[str, Outcome]) -> None:
    said = done["complete"].stdout  # the first time
    assert "note: schedule.max_steps 40 is not reached: 1 epoch has 2 steps; raise schedule.epochs to 20" in said
    found = re.search(r"4 samples in packs of at most ([\d,]+) tokens, (\d) images \(batch.max_tokens: 1,024\)", said)
    assert found and int(found[1].replace(",", "")) < 1024 and int(found[2]) <= 4  # of 1,024 tokens more would fit
    assert ", lengths " in next(line for line in said.splitlines() if "first step after" in line)
    assert "is not reached" not in done["run"].stdout


def test_pictures_of_questions_are_kept_small_by_their_content(folder: Path, done: dict[str, Outcome]) -> None:
    run = folder / "runs/run"
    answers = {line["id"]: line["pictures"] for line in read_lines(run / "answers.jsonl")[-3:]}
    assert {id_: len(names) for id_, names in answers.items()} == {
        "held-out-1-t": 0,
        "held-out-2-i": 1,
        "held-out-4-i": 1,
    }
    names = [name for of_question in answers.values() for name in of_question]
    assert names == [f"pictures/{sha256(run / name)[:16]}.jpg" for name in names]
    with Image.open(run / names[0]) as image:
        assert (image.format, image.size) == ("JPEG", (512, 171))
    assert len(list((run / "pictures").iterdir())) == len(set(names)) == 2


def test_a_stopped_run_has_a_report(folder: Path, done: dict[str, Outcome]) -> None:
    text = (folder / "stopped.html").read_text()
    assert "stopped after step 0" in text and text.count("<article>") == 3


def test_a_run_that_fails_has_a_report_of_its_steps(folder: Path, done: dict[str, Outcome]) -> None:
    assert done["stops"].code == 2
    n_steps = len(read_run(folder / "runs/stops").training)
    assert 0 < n_steps < 6
    assert f"stopped after step {n_steps} of 6" in (folder / "runs/stops/report.html").read_text()


def test_a_run_without_evaluation_is_reported_as_complete(folder: Path, done: dict[str, Outcome]) -> None:
    assert done["complete"].code == 0 and "evaluating" not in done["complete"].stdout
    text = (folder / "complete.html").read_text()
    assert '<span class="state complete">complete</span>' in text and "<article>" not in text
    assert not (folder / "runs/no-eval/pictures").exists()


def test_the_report_of_a_stage_that_is_passed_over_is_left_alone(folder: Path, done: dict[str, Outcome]) -> None:
    assert done["no-eval"].code == 0 and "no-eval: complete" in done["no-eval"].stdout
    assert not (folder / "runs/no-eval/report.html").exists()


def test_a_report_that_cannot_be_written_is_told_and_fails_nothing(folder: Path, done: dict[str, Outcome]) -> None:
    assert done["unwritable"].code == 0
    [line] = [line for line in done["unwritable"].stdout.splitlines() if "report.html" in line]
    assert line.startswith("runs/unwritable/report.html is not written: ") and "directory" in line
    assert (folder / "runs/unwritable/model/COMPLETE").is_file()
