"""Samples that cannot be trained on: the run stops and says which and why, or goes on and keeps a list."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import (
    TRAIN,
    Finished,
    Outcome,
    read_lines,
    run_many,
    run_ranks,
    start_ranks,
    wait,
    write_samples,
    write_stage,
)

KINDS = "itxitrbtiltiti"
"""Missing image 2, roles out of order 5, no picture 6, over-long 9."""
BAD = {2: "the image file is missing", 5: "roles out of order", 6: "not a readable image"}
SHARES = {"share": "txtttttr" + "t" * 8, "few": "t" * 23 + "x"}
"""Under the share of bad samples that a stage file allows by default, 5%: 2 of 16 are too many, 1 of 24 is not."""
BATCH = {"size": 4, "max_tokens": 400, "max_sample_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_samples(folder / "data.json", KINDS)
    write_samples(folder / "fine.json", "ittt")
    write_samples(folder / "many.json", "r" * 1200)
    write_samples(folder / "one-good.json", "rrri", seed=1)
    write_samples(folder / "cut.json", "iiii", seed=1)
    cut = json.loads((folder / "cut.json").read_text())
    for record in cut:
        record["conversations"][0]["value"] += " what" * 400
    (folder / "cut.json").write_text(json.dumps(cut))
    for name, kinds in {"missing": "itx", "roles": "itr", "picture": "itb", "long": "itl", "all-bad": "xxrr"}.items():
        write_samples(folder / f"{name}.json", kinds)
    return folder


def stage(folder: Path, name: str, **changes: Any) -> list[Any]:
    settings = {"batch": {**BATCH, "over_long": "drop"}, "on_bad_sample": "skip", "schedule": {"warmup": 0.0}}
    settings["max_bad_share"] = 1.0
    return ["--config", write_stage(folder / f"{name}.yaml", **{**settings, **changes})]


def held_out(path: str) -> dict[str, Any]:
    return {"every": 99, "data": [{"path": path}], "generate": 0}


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> dict[str, Outcome]:
    stops: dict[str, Any] = {"on_bad_sample": "error"}
    fine = [{"path": "fine.json"}]
    error: dict[str, Any] = {"batch": {**BATCH, "over_long": "error"}}
    commands = {
        name: stage(folder, name, **stops, data=[{"path": f"{name}.json"}]) for name in ("missing", "roles", "picture")
    }
    commands |= {
        "long": stage(folder, "long", **error, data=[{"path": "long.json"}]),
        "alone": stage(folder, "alone"),
        "truncate": stage(folder, "truncate", batch={**BATCH, "over_long": "truncate"}),
        "all-bad": stage(folder, "all-bad", data=[{"path": "all-bad.json"}]),
        "all-bad-many": stage(
            folder, "all-bad-many", data=[{"path": "many.json"}], batch={**BATCH, "size": 20}, logging={"every": 10}
        ),
        "cut-off": stage(folder, "cut-off", data=[{"path": "cut.json"}], batch={**BATCH, "over_long": "truncate"}),
        "first-bad": stage(folder, "first-bad", data=[{"path": "one-good.json"}], batch={**BATCH, "size": 1}),
        "held-out": stage(folder, "held-out", eval=held_out("data.json")),
        "held-out-stops": stage(folder, "held-out-stops", **stops, data=fine, eval=held_out("picture.json")),
        "held-out-none": stage(folder, "held-out-none", data=fine, eval=held_out("all-bad.json")),
    }
    for name, kinds in SHARES.items():
        settings: dict[str, Any] = {
            "data": [{"path": f"{name}.json"}],
            "on_bad_sample": "skip",
            "logging": {"every": 1},
        }
        write_samples(folder / f"{name}.json", kinds)
        commands[name] = ["--config", write_stage(folder / f"{name}.yaml", **settings)]
    commands["all-bad-again"] = commands["all-bad"]
    return {name: outcomes[0] for name, outcomes in run_many(commands, folder).items()}


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[str, list[Outcome]]:
    commands = {
        f"two-zero{zero}": stage(folder, f"two-zero{zero}", engine={"zero": zero, "precision": "fp32"})
        for zero in (0, 2, 3)
    }
    return run_many(commands, folder, n_ranks=2)


@pytest.fixture(scope="module")
def stopped_on_two_ranks(folder: Path) -> Finished:
    arguments = stage(folder, "stopped", on_bad_sample="error", data=[{"path": "picture.json"}])
    return run_ranks([TRAIN, *arguments], folder, n_ranks=2)


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("missing", "the image file is missing", "on_bad_sample: skip"),
        ("roles", "roles out of order: assistant, user", "on_bad_sample: skip"),
        ("picture", "not a readable image", "on_bad_sample: skip"),
        ("long", "more than batch.max_sample_tokens (400)", "batch.over_long: drop or truncate"),
    ],
)
def test_error_stops_and_names_file_sample_reason_and_remedy(
    name: str, reason: str, remedy: str, on_one_rank: dict[str, Outcome]
) -> None:
    outcome = on_one_rank[name]
    assert outcome.code == 2
    [line] = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert f"{name}.json: sample '{name}-2-" in line
    assert reason in line
    assert f"Mend it, or set {remedy}" in line
    assert "Traceback" not in outcome.stderr


def test_error_on_a_rank_other_than_the_first_is_said_too(stopped_on_two_ranks: Finished) -> None:
    assert all(code != 0 for code in stopped_on_two_ranks.codes)
    said = [line for text in stopped_on_two_ranks.stderr for line in text.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "picture.json: sample 'picture-2-b'" in said[0]


def test_error_ends_a_run_whose_workers_read_ahead(folder: Path) -> None:
    """They ignore SIGTERM, and a process waits for them at its end."""
    loader = {"workers": 2}
    data = [{"path": "missing.json"}]
    stage(folder, "workers", on_bad_sample="error", data=data, loader=loader, schedule={"epochs": 50})
    started = start_ranks([TRAIN, "--config", "workers.yaml"], folder)
    ended = wait(started, folder)
    assert ended.codes == [2], ended.stderr


@pytest.mark.parametrize("name", ["alone", "two-zero0", "two-zero2", "two-zero3"])
def test_skip_trains_on_and_keeps_one_line_a_bad_sample(
    name: str, folder: Path, on_one_rank: dict[str, Outcome], on_two_ranks: dict[str, list[Outcome]]
) -> None:
    outcomes = [on_one_rank[name]] if name == "alone" else on_two_ranks[name]
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].stderr
    lines = read_lines(folder / "runs" / name / "quarantine.jsonl")
    assert {line["index"]: line["id"] for line in lines} == {i: f"data-{i}-{KINDS[i]}" for i in (2, 5, 6, 9)}
    assert len(lines) == 4, "no sample twice"
    for line in lines:
        assert line["source"] == "data.json"
        assert BAD.get(line["index"], "more than batch.max_sample_tokens (400)") in line["reason"]
        assert 1 <= line["step"] <= math.ceil(len(KINDS) / 4)


def test_skipped_samples_do_not_depend_on_the_number_of_ranks(
    folder: Path, on_one_rank: dict[str, Outcome], on_two_ranks: dict[str, list[Outcome]]
) -> None:
    alone, *others = (
        read_lines(folder / "runs" / name / "metrics.jsonl")
        for name in ("alone", "two-zero0", "two-zero2", "two-zero3")
    )
    for lines in others:
        assert [line["n_supervised"] for line in lines] == [line["n_supervised"] for line in alone]
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=1e-5)


def test_truncate_trains_on_the_beginning_of_an_over_long_sample(folder: Path, on_one_rank: dict[str, Outcome]) -> None:
    assert on_one_rank["truncate"].code == 0, on_one_rank["truncate"].stderr
    quarantined = Counter(line["index"] for line in read_lines(folder / "runs/truncate/quarantine.jsonl"))
    assert quarantined == {2: 1, 5: 1, 6: 1}
    counts = {
        name: sum(line["n_supervised"] for line in read_lines(folder / "runs" / name / "metrics.jsonl"))
        for name in ("alone", "truncate")
    }
    assert 200 < counts["truncate"] - counts["alone"] < 400


@pytest.mark.parametrize("name", ["all-bad", "all-bad-many", "all-bad-again", "cut-off"])
def test_a_run_that_trained_on_nothing_writes_no_result_and_says_why(
    name: str, folder: Path, on_one_rank: dict[str, Outcome]
) -> None:
    outcome, run = on_one_rank[name], folder / "runs" / name.removesuffix("-again")
    assert outcome.code == 2, outcome.stderr
    [line] = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "nothing was trained in " in line and "fix the data" in line
    reasons = ["2 x an image that is missing", "2 x user and assistant do not take turns"]
    if name == "cut-off":
        reasons = ["4 samples were left out (4 x more tokens than batch.max_sample_tokens"]
    elif name == "all-bad-many":
        reasons = ["1000 samples were left out (1000 x "]
    assert all(reason in line for reason in reasons), line
    assert "finished" not in outcome.stdout and not (run / "model").exists()
    metrics = read_lines(run / "metrics.jsonl")
    assert {(each["loss"], each["n_supervised"], each["grad_norm"]) for each in metrics} == {(0.0, 0, 0.0)}
    assert metrics[-1]["step"] == {"all-bad": 1, "all-bad-again": 1, "all-bad-many": 50, "cut-off": 1}[name]


def test_bad_steps_beside_good_ones_end_no_run(folder: Path, on_one_rank: dict[str, Outcome]) -> None:
    assert on_one_rank["first-bad"].code == 0, on_one_rank["first-bad"].stderr
    counts = [line["n_supervised"] for line in read_lines(folder / "runs/first-bad/metrics.jsonl")]
    assert 0 in counts and max(counts) > 0


def test_quarantine_says_what_kind_of_problem_and_which_line(folder: Path, on_one_rank: dict[str, Outcome]) -> None:
    """All records are in the first line of the file."""
    lines = read_lines(folder / "runs/alone/quarantine.jsonl")
    kinds = {2: "image_missing", 5: "roles_out_of_order", 6: "not_an_image", 9: "over_long"}
    assert {line["index"]: line["kind"] for line in lines} == kinds
    assert [line["line"] for line in lines] == [1] * 4


def test_too_many_bad_samples_stop_a_run_that_skips_them(folder: Path, on_one_rank: dict[str, Outcome]) -> None:
    outcome = on_one_rank["share"]
    assert outcome.code == 2
    [line] = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "max_bad_share" in line
    assert "more than 5.0%" in line
    assert "quarantine.jsonl" in line
    assert "Traceback" not in outcome.stderr
    kept = Counter(line["kind"] for line in read_lines(folder / "runs/share/quarantine.jsonl"))
    words = {"image_missing": "an image that is missing", "roles_out_of_order": "user and assistant do not take turns"}
    assert kept
    for kind, count in kept.items():
        assert f"{count} x {words[kind]}" in line


def test_few_bad_samples_do_not_stop_it(folder: Path, on_one_rank: dict[str, Outcome]) -> None:
    assert on_one_rank["few"].code == 0, on_one_rank["few"].stderr
    [line] = read_lines(folder / "runs/few/quarantine.jsonl")
    assert (line["index"], line["kind"]) == (23, "image_missing")


def test_held_out_samples_are_left_out_and_counted_or_stop_the_run(
    folder: Path, on_one_rank: dict[str, Outcome]
) -> None:
    assert on_one_rank["held-out"].code == 0, on_one_rank["held-out"].stderr
    lines = [line for line in read_lines(folder / "runs/held-out/metrics.jsonl") if "eval_loss" in line]
    assert [line["eval_n_bad"] for line in lines] == [4, 4], "before the first step, and after the last"
    assert "4 samples left out" in on_one_rank["held-out"].stdout
    for name, words in {
        "held-out-stops": "picture.json: sample 'picture-2-b'",
        "held-out-none": "eval.data: none of its samples can be read",
    }.items():
        assert on_one_rank[name].code == 2
        assert words in on_one_rank[name].stderr


def test_an_interruption_changes_nothing_in_what_is_too_many(folder: Path) -> None:
    """One bad sample of 24 is not: neither at once nor after a restart just before it."""
    stage(folder, "again", max_bad_share=0.05, data=[{"path": "few.json"}], checkpoint={"every": 1, "keep": 9})
    first = run_many({"again": ["--config", "again.yaml"]}, folder)["again"][0]
    assert first.code == 0, first.stderr
    [line] = read_lines(folder / "runs/again/quarantine.jsonl")
    shutil.rmtree(folder / "runs/again/model")
    for path in (folder / "runs/again/checkpoints").iterdir():
        if path.is_dir() and int(path.name.partition("-")[2] or 0) >= line["step"]:
            shutil.rmtree(path)
    second = run_many({"again": ["--config", "again.yaml"]}, folder)["again"][0]
    assert second.code == 0, second.stderr
    assert read_lines(folder / "runs/again/quarantine.jsonl") == [line]
    assert read_lines(folder / "runs/again/metrics.jsonl")[-1]["n_bad"] == 1
