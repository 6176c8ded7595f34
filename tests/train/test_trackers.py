"""What TensorBoard and wandb get, read back from what they wrote; and trackers that fail."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from llava_train.config import StageConfig
from llava_train.run_files import TENSORBOARD_FOLDER, WANDB_ID_FILE
from llava_train.train import trackers as trackers_module
from llava_train.train import wandb_run
from llava_train.train.curves import curves
from llava_train.train.lines import EvaluationLine, StepLine
from llava_train.train.trackers import Trackers
from llava_train.train.wandb_run import run_id
from tests.tiny import stage
from tests.train.wandb_files import WandbFile, read_wandb
from tests.train.wandb_server import WandbServer

NO_SERVER = "http://127.0.0.1:9"
PICTURES = ("pictures/red.jpg", "pictures/blue.jpg")
ANSWERS = (
    {"id": "q1", "prompt": "<b>what</b>?", "answer": "a *cat*", "expected": "a dog", "pictures": [PICTURES[0]]},
    {"id": "q2", "prompt": "which two?", "answer": "two\nlines", "expected": "both", "pictures": list(PICTURES)},
    {"id": "q3", "prompt": "why?", "answer": "", "expected": "so", "pictures": []},
)


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl whose loss tells the step."""
    found: dict[str, Any] = dict.fromkeys(StepLine.model_fields, 0.5)
    counts = ("n_supervised", "n_bad", "skipped_steps", "peak_memory_bytes")
    found |= {"step": step, "loss": 1.0 / step, **dict.fromkeys(counts, 7), "mfu": None}
    found |= {
        "lr": {"projector": 1e-3, "language_model": 2e-5},
        "grad_norms": {"projector": 0.3, "language_model": 0.4},
    }
    found |= {"sources": {"coco/train": {"loss": 2.0 / step, "n_supervised": 9, "n_samples": 4}}}
    found |= {"sample_lengths": [1] * 32, "pack_fill": [2] * 10, "time": 1e9 + step, **changes}
    StepLine.model_validate(found)
    return found


def evaluated(step: int) -> dict[str, Any]:
    found = {"step": step, "time": 1e9, "eval_loss": 3.0, "eval_n_bad": 0, "eval_vqa": 0.5, "eval_vqa_low": 0.4}
    EvaluationLine.model_validate(found)
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StageConfig:
    """A run that stopped after step 6, and went on from its checkpoint of step 4 to step 8."""
    folder = tmp_path_factory.mktemp("trackers")
    logging = {"tensorboard": True, "wandb": {"project": "llava", "mode": "offline"}}
    config = stage(Path("x"), name="run", logging=logging, output=str(folder))
    (config.run_dir / "pictures").mkdir(parents=True)
    for name, colour in zip(PICTURES, ((250, 0, 0), (0, 0, 250)), strict=True):
        Image.new("RGB", (8, 6), colour).save(config.run_dir / name)
    said: list[str] = []
    for start, steps in ((0, (1, 2, 3, 4, 5, 6)), (4, (5, 6, 7, 8))):
        trackers = Trackers(config, True, start, said.append)
        if not start:
            trackers.answers(0, ANSWERS)
        for step in steps:
            trackers.metrics(step, line(step))
        trackers.metrics(steps[-1], evaluated(steps[-1]))
        trackers.answers(steps[-1], ANSWERS)
        trackers.close(failed=start == 0)
    wandb.teardown()  # its process has written all, as at the end of ours
    assert len(said) == 2, said
    assert all(text.startswith("logging.wandb: `wandb sync ") for text in said)
    return config


@pytest.fixture(scope="module")
def events(config: StageConfig) -> EventAccumulator:
    """What TensorBoard's server makes of the event files."""
    sizes = {"tensors": 0, "scalars": 0, "images": 0}
    return EventAccumulator(str(config.run_dir / TENSORBOARD_FOLDER), size_guidance=sizes).Reload()


@pytest.fixture(scope="module")
def starts(config: StageConfig) -> list[WandbFile]:
    return [read_wandb(path) for path in sorted(config.run_dir.glob("wandb/offline-run-*/*.wandb"))]


def points(events: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]


def test_tensorboard_has_each_step_once_after_an_interruption(events: EventAccumulator) -> None:
    assert points(events, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert events.Tensors("train/loss")[0].wall_time == 1e9 + 1
    assert [step for step, _ in points(events, "eval/vqa")] == [8]
    tags = {tag for tag in events.Tags()["tensors"] if not tag.startswith("answers/")}
    assert tags == curves(line(1)).keys() | curves(evaluated(1)).keys()


def test_tensorboard_shows_answers_as_they_are_and_their_pictures(events: EventAccumulator) -> None:
    texts = points(events, "answers/q1/text_summary")
    assert [step for step, _ in texts] == [0, 8]
    assert b"    <b>what</b>?" in texts[0][1].item()
    assert b"    a *cat*" in texts[0][1].item()
    assert [step for step, _ in points(events, "answers/q2/1")] == [0, 8], "also a picture of another question"
    pictures = points(events, "answers/q2/2")
    assert [step for step, _ in pictures] == [0, 8]
    width, height, content = pictures[0][1]
    assert (width, height) == (b"8", b"6")
    assert np.asarray(Image.open(io.BytesIO(content)))[0, 0].tolist() == pytest.approx([0, 0, 250], abs=9)


def test_wandb_goes_on_with_one_run_and_refuses_no_step(starts: list[WandbFile]) -> None:
    assert len(starts) == 2
    assert len({start.run_id for start in starts}) == 1
    of_steps = [[row["step"] for row in start.rows if "train/loss" in row] for start in starts]
    assert of_steps == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 8]]
    for start in starts:
        assert start.step_metrics["*"] == "step"
        assert start.project == "llava"
    assert [start.exit_code for start in starts] == [1, 0]


def test_wandb_has_the_stage_file_and_the_curves_of_each_line(config: StageConfig, starts: list[WandbFile]) -> None:
    assert starts[0].config["trainable"]["projector"]["lr"] == config.trainable.projector.lr
    assert starts[0].rows[1] == {"step": 1, **curves(line(1))}
    assert starts[0].rows[-2] == {"step": 6, **curves(evaluated(6))}


def test_wandb_has_a_table_of_answers_with_pictures(config: StageConfig, starts: list[WandbFile]) -> None:
    [row] = [row for row in starts[1].rows if "answers/path" in row]
    assert row["step"] == 8
    table = json.loads((starts[1].folder / "files" / row["answers/path"]).read_text())
    assert table["columns"] == ["id", "picture 1", "picture 2", "prompt", "answer", "expected"]
    assert [[cells[0], *cells[3:]] for cells in table["data"]] == [
        [answer[key] for key in ("id", "prompt", "answer", "expected")] for answer in ANSWERS
    ]
    assert [[cell is not None for cell in cells[1:3]] for cells in table["data"]] == [[1, 0], [1, 1], [0, 0]]
    assert all(path.is_relative_to(config.run_dir.resolve()) for path in starts[1].pictures)
    kept = sorted(path.read_bytes() for path in starts[1].pictures)
    assert kept == sorted((config.run_dir / name).read_bytes() for name in PICTURES)


class Raises:
    """A tracker that fails in one method, and counts its calls."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, list[str]()
        if where == "start":
            raise RuntimeError("no room in start")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.where:
            raise OSError(f"no room in {name}")

    def metrics(self, step: int, metrics: Any) -> None:
        self._call("metrics")

    def answers(self, step: int, answers: Any) -> None:
        self._call("answers")

    def close(self, failed: bool) -> None:
        self._call("close")


@pytest.mark.parametrize("where", ["start", "metrics", "answers", "close"])
def test_a_tracker_that_fails_is_told_once_and_left(
    where: str, config: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Raises("nowhere"), None

    def start_bad(*_: Any) -> Raises:
        nonlocal bad
        bad = Raises(where)
        return bad

    monkeypatch.setattr(trackers_module, "_tensorboard", start_bad)
    monkeypatch.setattr(trackers_module, "_wandb", lambda *_: good)
    said: list[str] = []
    trackers = Trackers(config, True, 0, said.append)
    for step in (1, 2):
        trackers.metrics(step, line(step))
        trackers.answers(step, ANSWERS)
    trackers.close(failed=False)
    told = f"logging.tensorboard: no room in {where}; the run goes on without it, metrics.jsonl has everything"
    assert said == [told]
    assert good.calls == ["metrics", "answers", "metrics", "answers", "close"]
    assert bad is None or bad.calls == good.calls[: good.calls.index(where) + 1]


def test_a_package_that_is_missing_is_a_tracker_that_fails(
    config: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llava_train.train.tensorboard", "llava_train.train.wandb_run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    Trackers(config, True, 0, said.append).metrics(1, line(1))
    assert [text.split(":")[0] for text in said] == ["logging.tensorboard", "logging.wandb"]
    assert "import of wandb halted" in said[1]


def test_other_ranks_and_those_who_disabled_wandb_have_none(tmp_path: Path, config: StageConfig) -> None:
    disabled = stage(Path("x"), output=str(tmp_path), logging={"wandb": {"project": "x", "mode": "disabled"}})
    for settings, is_main in ((config, False), (disabled, True)):
        Trackers(settings, is_main, 0, pytest.fail).metrics(1, line(1))
    assert not (disabled.run_dir / WANDB_ID_FILE).exists()


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageConfig]:
    """A run that sends to WANDB_BASE_URL, of which nobody knows anything yet, and does not wait for long."""
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = wandb_run._start

    def start_soon(config: StageConfig, section: Any, mode: Any) -> Any:
        """Without a server a start is given up after a second; one that needs none has its time."""
        with pytest.MonkeyPatch.context() as patch:
            if mode == "online" and os.environ["WANDB_BASE_URL"] == NO_SERVER:
                patch.setattr(wandb_run, "_START_S", 1)
            return start(config, section, mode)

    monkeypatch.setattr(wandb_run, "_start", start_soon)
    config = stage(Path("x"), output=str(tmp_path), logging={"wandb": {"project": "x"}})
    config.run_dir.mkdir(parents=True)
    yield config
    wandb.teardown()


class Terminal(io.StringIO):
    """Standard input or error of a person who does not answer."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:
        pytest.fail("a run must not wait for an answer")


@pytest.mark.parametrize("key", ["", "0" * 40], ids=["no key", "no server"])
def test_wandb_that_cannot_be_reached_is_told_and_kept_offline(
    key: str, online: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    said: list[str] = []
    trackers = Trackers(online, True, 0, said.append)
    trackers.metrics(1, line(1))
    trackers.close(failed=False)
    wandb.teardown()
    assert len(said) == 2, said
    assert said[0].endswith("; kept offline (`wandb login` makes a key known)")
    [kept] = online.run_dir.glob("wandb/offline-run-*")
    assert said[1] == f"logging.wandb: `wandb sync {kept}` sends it"
    assert read_wandb(next(kept.glob("*.wandb"))).rows == [{"step": 1, **curves(line(1))}]


def test_a_server_of_wandb_gets_each_start_as_one_run(online: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for start, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
            trackers = Trackers(online, True, start, said.append)
            for step in steps:
                trackers.metrics(step, line(step))
                if step == 2:
                    trackers.answers(step, ANSWERS)  # for which this server knows too little
            trackers.close(failed=start == 0)
        [run] = server.rows
        assert [(row["_step"], row["step"]) for row in server.rows[run]] == list(enumerate((1, 2, 3, 2, 3, 4)))
        assert [row["train/loss"] for row in server.rows[run]] == [
            line(row["step"])["loss"] for row in server.rows[run]
        ]
        assert server.exit_codes[run] == [1, 0]
    assert said[::2] == [f"logging.wandb: {server.url}/me/x/runs/{run}"] * 2
    why = "logging.wandb: without the answers of step 2, which answers.jsonl has: "
    assert all(text.startswith(why) for text in said[1::2]) and len(said) == 4


def test_a_server_that_does_not_answer_does_not_hold_a_run_up(
    online: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "_END_S", 1)
    monkeypatch.setattr(wandb_run, "_LEAVE_S", 1)
    said: list[str] = []
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        server.answers.clear()
        trackers = Trackers(online, True, 0, said.append)
        trackers.metrics(1, line(1))
        trackers.close(failed=False)
        wandb_run._end_process()  # as at the end of ours
        assert not server.answers.is_set()
        assert not [each for each in psutil.Process().children() if each.name() == "wandb-core"], "it is waited for"
    [kept] = online.run_dir.glob("wandb/run-*/*.wandb")
    assert read_wandb(kept).rows == [{"step": 1, **curves(line(1))}]
    assert said[1].startswith(
        f"logging.wandb: the server did not take all within 1 s; `wandb sync {online.run_dir}/wandb/run-"
    )


def test_a_run_of_wandb_belongs_to_a_folder_and_its_name(tmp_path: Path) -> None:
    path = tmp_path / WANDB_ID_FILE
    first = run_id(path, "a")
    assert run_id(path, "a") == first
    assert run_id(path, "copy-of-a") != first
    path.write_text("{")
    assert run_id(path, "a") != first


def test_what_is_null_or_not_finite_has_no_point() -> None:
    unknown = {"loss": float("inf"), "grad_norm": float("nan"), "grad_norms": {"projector": None}}
    found = curves(line(3) | unknown)
    assert not any(name.startswith(("train/loss", "train/grad_norm", "speed/mfu")) for name in found)
    assert found["train/lr/projector"] == 1e-3
    assert found["loss_by_source/coco/train"] == pytest.approx(2 / 3)
