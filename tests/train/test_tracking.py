"""What a run keeps: metrics.jsonl, answers.jsonl, config.yaml, TensorBoard, wandb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_train.config import StageConfig
from llava_train.files import sha256
from llava_train.run_files import quarantine_summary
from llava_train.train.curves import curves
from llava_train.train.lines import EvaluationLine, StepLine, rows
from llava_train.train.records import Records, _drop_after
from llava_train.train.world import World
from tests.train.helpers import ROOT, Outcome, read_lines, run_many, write_samples, write_stage
from tests.train.wandb_files import read_wandb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    """A run of 7 steps that logs each third and evaluates each fourth."""
    write_samples(folder / "data.json", "it" * 14)
    write_samples(folder / "held-out.json", "xititi")
    stage = write_stage(
        folder / "run.yaml",
        on_bad_sample="skip",
        schedule={"warmup": 0.3},
        logging={"every": 3, "tensorboard": True, "wandb": {"project": "llava", "mode": "offline"}},
        eval={"every": 4, "data": [{"path": "held-out.json"}], "generate": 2, "max_new_tokens": 3},
    )
    [outcome] = run_many({"run": ["--config", stage]}, folder)["run"]
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_metrics_hold_the_first_the_last_and_each_nth_step(folder: Path, outcome: Outcome) -> None:
    lines = [line for line in read_lines(folder / "runs/run/metrics.jsonl") if "eval_loss" not in line]
    assert [line["step"] for line in lines] == [1, 3, 6, 7]
    for line in lines:
        StepLine.model_validate(line)
        assert line["lr"].keys() == line["grad_norms"].keys() == {"projector", "language_model"}
        assert math.hypot(*line["grad_norms"].values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert line["n_supervised"] > 0
        assert 0 <= line["data_wait_s"] < line["step_s"]
    assert lines[0]["lr"]["projector"] == 0.0
    assert lines[1]["lr"]["projector"] == pytest.approx(2e-4 * 2 / 3)
    assert lines[-1]["time_left_s"] == 0.0
    assert [sum(line["sample_lengths"]) for line in lines] == [4, 8, 12, 4], "every sample of the steps since"
    assert lines[2]["evaluation_s"] > 0, "after step 4"


def test_the_schema_of_metrics_is_what_the_page_says() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for kind in (StepLine, EvaluationLine):
        table = "\n".join(f"| `{key}` | {unit} | {what} |" for key, unit, what in rows(kind))
        assert table in page, f"docs/metrics.md should hold\n{table}"
        assert all(what for _, _, what in rows(kind))


def test_trackers_have_the_curves_of_every_line(folder: Path, outcome: Outcome) -> None:
    lines = read_lines(folder / "runs/run/metrics.jsonl")
    [path] = (folder / "runs/run/wandb").glob("offline-run-*/*.wandb")
    sent = read_wandb(path)
    rows_of_lines = [row for row in sent.rows if "answers/path" not in row]
    assert rows_of_lines == [pytest.approx({"step": line["step"], **curves(line)}) for line in lines]
    assert len(sent.rows) == len(lines) + sum("eval_loss" in line for line in lines), "each evaluation has a table"
    assert sent.config["about"]["n_ranks"] == 1
    events = EventAccumulator(str(folder / "runs/run/tensorboard")).Reload()
    for name in ("train/grad_norm/projector", "speed/tokens_per_s", "loss_by_source/data", "eval/loss"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(line["step"], pytest.approx(curves(line)[name])) for line in lines if name in curves(line)]
        assert points


def test_held_out_loss_and_answers_are_kept(folder: Path, outcome: Outcome) -> None:
    losses = [line for line in read_lines(folder / "runs/run/metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in losses] == [0, 4, 7]
    assert all(0 < EvaluationLine.model_validate(line).eval_loss < 10 for line in losses)
    answers = read_lines(folder / "runs/run/answers.jsonl")
    assert [(line["step"], line["id"]) for line in answers] == [
        (step, sample) for step in (0, 4, 7) for sample in ("held-out-1-i", "held-out-2-t")
    ]
    for line in answers:
        assert line.keys() == {"step", "id", "prompt", "answer", "expected", "pictures"}
        assert "what" in line["prompt"]
        assert line["expected"].endswith(".")
    assert "step 4  held-out loss" in outcome.stdout


def test_every_logged_step_is_printed(outcome: Outcome) -> None:
    lines = [line for line in outcome.stdout.splitlines() if " tokens/s " in line]
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "6/7", "7/7"]


def test_the_card_says_what_ran(folder: Path, outcome: Outcome) -> None:
    card = yaml.safe_load((folder / "runs/run/config.yaml").read_text())
    about = card.pop("about")
    assert StageConfig.model_validate(card).name == "run"
    assert about["data"] == [
        {"path": "data.json", "name": "data", "n_samples": 28, "fingerprint": sha256(folder / "data.json")}
    ]
    assert about["n_ranks"] == 1
    assert {"llava_train", "torch", "transformers", "deepspeed", "peft", "git_commit"} <= about.keys()


def test_records_after_the_resumed_step_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.5}, {"step": 4, "eval_loss": 1.7}]
    later = [{"step": 5, "loss": 1.4}, {"step": 6, "loss": 1.3}]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept + later) + '{"step": 2, "lo')
    _drop_after(path, 4)
    assert read_lines(path) == kept
    _drop_after(tmp_path / "never-written.jsonl", 4)
    assert not (tmp_path / "never-written.jsonl").exists()


def test_half_a_character_is_kept_as_json_has_it(tmp_path: Path) -> None:
    records = Records(tmp_path, World(0, 1, torch.device("cpu")), 0)
    record = {"step": 1, "id": "\ud83d of a pair", "kind": "image_missing"}
    records.append("quarantine.jsonl", record)
    _drop_after(tmp_path / "quarantine.jsonl", 4)
    assert read_lines(tmp_path / "quarantine.jsonl") == [record]


def test_the_quarantine_is_counted_whatever_its_texts_hold(tmp_path: Path) -> None:
    records = [{"step": 1, "id": "a\u2028b", "kind": "image_missing"}, {"step": 2, "id": "c", "kind": "over_long"}]
    path = tmp_path / "quarantine.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in [*records, records[0]]), encoding="utf-8")
    assert quarantine_summary(path) == "2 x an image that is missing, 1 x more tokens than batch.max_sample_tokens"
    assert quarantine_summary(tmp_path / "none") == ""
