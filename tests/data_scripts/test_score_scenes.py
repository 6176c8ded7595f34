"""Scores of held-out scenes: what is asked, what counts as right, and what is kept."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.data_scripts.test_draw_scenes import run
from tests.scripts import load_script

scoring = load_script("scripts/score_scenes.py")


class Knowing:
    """Knows the right answers when it sees a picture of scenes, and says `yes` when it does not."""

    def __init__(self, questions: list[scoring.Question]) -> None:
        self.right = {(q.image, q.text): q.expected for q in questions}
        self.n_asked = 0

    def answers(self, pairs: list[tuple[Image.Image | Path, str]], what: str) -> list[str]:
        self.n_asked += len(pairs)
        return [self.right[image, text] if isinstance(image, Path) else "yes" for image, text in pairs]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score") / "scenes"
    assert run(folder, "--held-out", "30").returncode == 0
    return folder / "held_out.json"


def test_every_question_is_asked_alone_with_its_picture(held_out: Path) -> None:
    questions = scoring.read_questions(held_out)
    rows = json.loads(held_out.read_text())
    assert len(questions) == sum(len(row["kinds"]) for row in rows)
    assert all(question.image.is_file() for question in questions)
    assert not any("<image>" in question.text for question in questions)


def test_what_lies_above_guessing_was_seen(held_out: Path) -> None:
    questions = scoring.read_questions(held_out)
    answers = scoring.ask_all(Knowing(questions), questions)
    assert scoring.cell_of(questions, answers, None, 1).startswith("100 / ")
    for kind in ("colour", "position", "existence", "count"):
        picture, blank, frequent = map(int, scoring.cell_of(questions, answers, kind, 1).split(" / "))
        assert picture == 100 and blank == 0 and frequent < 60
    assert scoring.cell_of(questions, answers, "relation", 1) == "-"


def test_a_verdict_is_right_whatever_was_seen(held_out: Path) -> None:
    questions = scoring.read_questions(held_out)
    answers = scoring.ask_all(Knowing(questions), questions)
    mistaken = [answer.replace("red", "blue").replace("circle", "star") for answer in answers["picture"]]
    short, given = scoring.verdicts(questions, {**answers, "picture": mistaken})
    assert {q.expected for q in short if q.kind == "existence"} == {"yes", "no"}
    picture, blank, frequent = map(int, scoring.cell_of(short, given, "existence", 1).split(" / "))
    assert picture == 100 and 0 < blank < 100
    assert frequent == max(blank, 100 - blank)
    assert given["picture"] != answers["picture"]


def test_the_table_shows_every_kind_and_size(held_out: Path) -> None:
    questions = scoring.read_questions(held_out)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scoring.table_of(questions, scoring.ask_all(Knowing(questions), questions)))
    text = console.export_text()
    assert all(word in text for word in ("1 object", "2 objects", "3 objects", "existence", "relation", "all"))


def test_answers_are_kept_and_used_again_only_for_the_same_model_and_questions(held_out: Path, tmp_path: Path) -> None:
    questions = scoring.read_questions(held_out)
    answers = scoring.ask_all(Knowing(questions), questions)
    kept = tmp_path / "held_out_answers.json"
    assert scoring.asked_before(kept, "a model") is None
    scoring.write_answers(kept, "a model", questions, answers)
    assert scoring.asked_before(kept, "a model") == answers
    assert scoring.asked_before(kept, "another model") is None
    first = json.loads(kept.read_text())["questions"][0]
    assert (first["question"], first["expected"]) == (questions[0].text, questions[0].expected)
    assert first["answers"]["picture"] == questions[0].expected


def test_the_fingerprint_changes_with_the_weights_and_the_questions(held_out: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = scoring.fingerprint_of(tmp_path, held_out)
    assert scoring.fingerprint_of(tmp_path, held_out) == first
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert scoring.fingerprint_of(tmp_path, held_out) != first


def test_a_missing_model_is_named(held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["score", "--model", str(tmp_path), "--data", str(held_out)])
    with pytest.raises(SystemExit, match="config.json is missing; run scripts/quickstart.sh"):
        scoring.main()
