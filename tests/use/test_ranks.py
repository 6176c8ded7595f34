"""Evaluations of several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import distributed

from llava_train.errors import UserError
from llava_train.use.answers import AnswersError
from llava_train.use.evaluate import Evaluation, evaluate
from llava_train.use.ranks import Ranks
from tests.train.helpers import read_lines, run_ranks
from tests.use.evaluations import command, run, write, write_pope
from tests.use.exports import export_tiny

BY_SRUN = """
import os, runpy
rank, n_ranks, _ = (os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_STEP_NUM_TASKS=n_ranks)
runpy.run_module("llava_train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `model/` of a finished run."""
    return export_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pope(tmp_path)


def test_two_ranks_give_what_one_gives(model: Path, data: Path, tmp_path: Path) -> None:
    alone = run(model, data, "--blind", "--json")
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").unlink()
    worker = ["-m", "tests.train.ending_rank", "-m", "llava_train"]
    done = run_ranks([*worker, *command(model, data, "--blind", "--json")], tmp_path, 2).check()
    assert [(tmp_path / f"groups-{rank}").read_text() for rank in (0, 1)] == ["False"] * 2, "groups are left"
    assert (tmp_path / "a.jsonl").read_bytes() == content
    assert json.loads(done.stdout[0]) == json.loads(alone.stdout) and not done.stdout[1]
    assert not list(tmp_path.glob("*.rank*"))


def test_on_two_ranks_an_error_is_said_once(model: Path, data: Path, tmp_path: Path) -> None:
    done = run_ranks(["-m", "llava_train", *command(tmp_path / "no-model", data)], tmp_path, 2)
    assert done.codes == [2, 2]
    assert [text.count("error: ") for text in done.stderr] == [1, 0]


def test_a_picture_that_one_rank_cannot_read_ends_all_and_is_said_once(model: Path, data: Path, tmp_path: Path) -> None:
    rows = read_lines(data)
    rows[5]["image"] = "images/bad.png"  # the second longest question is the first of rank 1
    (tmp_path / "images/bad.png").write_bytes(b"no picture")
    write(data, rows)
    done = run_ranks(["-m", "llava_train", *command(model, data)], tmp_path, 2)
    assert done.codes == [2, 2]
    assert [text.count("error: ") for text in done.stderr] == [1, 0]
    assert "pope.jsonl:6: question 105: " in done.stderr[0] and "--skip-bad" in done.stderr[0]
    assert not any("Traceback" in text for text in done.stderr)
    done = run_ranks(["-m", "llava_train", *command(model, data, "--skip-bad", "--json")], tmp_path, 2).check()
    report = json.loads(done.stdout[0])
    assert report["n"] == 6 and len(report["skipped"]) == 1


def test_a_rank_learns_that_another_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = distributed.HashStore()
    failing, other = Ranks(0, 2, store), Ranks(1, 2, store)
    monkeypatch.setattr(Ranks, "gather", lambda self, values: values)
    assert other.on_all(lambda: 7) == 7 and not other.has_failed
    with pytest.raises(UserError, match="what went wrong"):
        failing.on_all(lambda: _fail("what went wrong"))
    assert other.has_failed


def _fail(reason: str) -> None:
    raise UserError(reason)


def test_nothing_more_is_asked_once_a_rank_failed(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "has_failed", True)
    with pytest.raises(AnswersError, match="lacks 7 answers"):
        evaluate(Evaluation(str(model), data, "pope", answers=data.parent / "a.jsonl"))


def test_tasks_of_srun_are_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "srun.py").write_text(BY_SRUN)
    done = run_ranks([tmp_path / "srun.py", *command(model, data, "--json")], tmp_path, 2).check()
    assert not done.stdout[1], "rank 0 alone prints the score"
    assert json.loads(done.stdout[0]) == json.loads(run(model, data, "--json").stdout)
