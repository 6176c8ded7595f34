"""The answers file: resumed, refused, locked, set aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_train.use.answers import Answer, AnswersFile, digest_of_model
from llava_train.use.evaluate import _Asker
from llava_train.use.questions import read_questions
from tests.train.helpers import read_lines
from tests.use.evaluations import N, run, write, write_pope
from tests.use.exports import export_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `model/` of a finished run."""
    return export_tiny(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pope(tmp_path)


class Killed(BaseException):
    """Nothing of the command hears of it."""


def test_a_killed_evaluation_goes_on(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, allowed, answers = list[int](), 4, _Asker.answers

    def counted(self: _Asker, indices: list[int], way: str) -> Any:
        if len(asked) == allowed:
            raise Killed
        asked.extend(indices)
        return answers(self, indices, way)

    monkeypatch.setattr(_Asker, "answers", counted)
    path = data.parent / "a.jsonl"
    with pytest.raises(Killed):
        run(model, data)
    assert len(read_lines(path)) == 4
    path.write_bytes(path.read_bytes()[:-9])  # the last line was cut off
    kept, allowed = asked[:3], 99
    asked.clear()
    assert run(model, data).exit_code == 0
    assert sorted(kept + asked) == list(range(N))
    assert run(model, data, "--answers", str(data.parent / "whole.jsonl")).exit_code == 0
    assert path.read_bytes() == (data.parent / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--max-new-tokens", "6"], ["max_new_tokens: 5 there, 6 here"]),
        (["--prompt-suffix", "Be brief."], ["prompt_suffix: '' there, 'Be brief.' here"]),
        (["--dtype", "fp32"], ["dtype: 'auto' there, 'fp32' here"]),
        (["--chat-template", "vicuna_v1"], ["chat_template: none there, 'vicuna_v1' here"]),
        (["--images", "FOLDER/other"], ["images: 'FOLDER' there, 'FOLDER/other' here"]),
        (
            ["--images", "FOLDER/other", "--dtype", "fp32", "--max-new-tokens", "6"],
            [
                "images: 'FOLDER' there, 'FOLDER/other' here",
                "dtype: 'auto' there, 'fp32' here",
                "max_new_tokens: 5 there, 6 here",
            ],
        ),
    ],
)
def test_answers_of_another_evaluation_are_refused_with_what_differs(
    model: Path, data: Path, more: list[str], what: list[str]
) -> None:
    shutil.copytree(data.parent / "images", data.parent / "other/images")
    more, what = ([text.replace("FOLDER", str(data.parent)) for text in texts] for texts in (more, what))
    run(model, data)
    content = (data.parent / "a.jsonl").read_bytes()
    refused = run(model, data, *more)
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        f"error: {data.parent}/a.jsonl holds answers of another evaluation:",
        *[f"  {line}" for line in what],
        "name another file (--answers), or replace it (--overwrite)",
    ]
    assert (data.parent / "a.jsonl").read_bytes() == content
    assert run(model, data, *more, "--overwrite").exit_code == 0


def test_answers_of_another_model_or_program_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data)
    other = export_tiny(tmp_path / "other", "vicuna_v1")
    assert f"\n  model: {model.parent.name} there, other here\n" in run(other, data).stderr
    changed = export_tiny(tmp_path / model.parent.name / "model", "vicuna_v1")
    assert "\n  model: its files have changed\n" in run(changed, data).stderr
    write(data.parent / "a.jsonl", [{"question_id": 100, "text": "yes"}])
    assert "a.jsonl:1: not an answer of" in run(model, data).stderr


def test_changed_questions_are_told_from_others(model: Path, data: Path) -> None:
    run(model, data)
    rows = read_lines(data)
    rows[0]["text"] = "Is it green?"
    write(data, rows)
    assert "\n  questions: their texts, ids or pictures have changed\n" in run(model, data).stderr
    data.rename(data.with_name("other.jsonl"))
    refused = run(model, data.with_name("other.jsonl")).stderr
    assert f"\n  data: '{data}' there, '{data.with_name('other.jsonl')}' here\n" in refused


def test_answers_from_before_places_were_kept_go_on(model: Path, data: Path) -> None:
    run(model, data)
    path = data.parent / "a.jsonl"
    rows = read_lines(path)
    for row in rows:
        del row["metadata"]["data"], row["metadata"]["images"]
    write(path, rows)
    assert run(model, data).exit_code == 0
    write(path, rows)
    shutil.copytree(data.parent / "images", data.parent / "other/images")
    refused = run(model, data, "--images", str(data.parent / "other")).stderr
    assert "questions: their texts, ids or pictures, or the places of their pictures, have changed" in refused


def test_moved_questions_go_on(model: Path, data: Path) -> None:
    run(model, data)
    data.rename(data.with_name("same.jsonl"))
    assert run(model, data.with_name("same.jsonl")).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"answer_id": "of another program"},
        {"answer_id": ["a"]},
        {"metadata": 3},
        {"log_likelihoods": 0.5},
        {"log_likelihoods": [0.5]},
    ],
)
def test_a_line_that_is_no_answer_is_named(model: Path, data: Path, change: dict[str, Any]) -> None:
    run(model, data)
    path = data.parent / "a.jsonl"
    rows = read_lines(path)
    rows[2].update(change)
    if "log_likelihoods" in change:
        rows[2]["metadata"]["log_likelihoods"] = change["log_likelihoods"]
    refused = run(model, write(path, rows).parent / "pope.jsonl")
    assert refused.exit_code == 2 and "a.jsonl:3: not an answer of" in refused.stderr


def test_a_file_that_another_evaluation_writes_is_left_alone(model: Path, data: Path) -> None:
    path = data.parent / "a.jsonl"
    run(model, data, "--limit", "3")
    content = path.read_bytes()
    with AnswersFile(path, [], "m", {}).locked():
        refused = run(model, data, "--overwrite")
    assert refused.exit_code == 2 and f"{path}: another evaluation writes it" in refused.stderr.replace("\n", "")
    assert path.read_bytes() == content
    assert run(model, data).exit_code == 0, "the lock is gone"


def test_a_score_is_of_all_questions_or_there_is_none(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = AnswersFile.append

    def lossy(self: AnswersFile, part: Path, answers: dict[int, Answer]) -> None:
        append(self, part, {index: answer for index, answer in answers.items() if index != 4})

    monkeypatch.setattr(AnswersFile, "append", lossy)
    refused = run(model, data)
    assert refused.exit_code == 2 and "lacks 1 answers, the first to question 104" in refused.stderr
    assert not (data.parent / "a.scores.json").exists()
    monkeypatch.undo()
    assert json.loads(run(model, data, "--json").stdout)["n"] == N


def test_questions_that_share_a_blank_picture_are_all_left_out(model: Path, data: Path) -> None:
    rows = read_lines(data)
    for row in rows[2:4]:
        row["text"] = "Is <|im_end|> there?"
    done = run(model, write(data, rows), "--blind", "--skip-bad", "--json")
    report = json.loads(done.stdout)
    assert report["n"] == N - 2
    assert [reason.split(": ")[1] for reason in report["skipped"]] == ["question 102", "question 103"]


def test_overwriting_loses_no_answers(model: Path, data: Path) -> None:
    run(model, data)
    path = data.parent / "a.jsonl"
    content = path.read_bytes()
    assert run(data.parent / "no-model", data, "--overwrite").exit_code == 2
    assert path.read_bytes() == content
    assert run(model, data, "--overwrite", "--max-new-tokens", "3").exit_code == 0
    assert path.read_bytes() != content
    assert path.with_name("a.jsonl.bak").read_bytes() == content


def test_parts_are_set_aside_with_the_file(data: Path) -> None:
    file = AnswersFile(data.parent / "a.jsonl", read_questions(data, "pope"), "m", {})
    file.append(file.path, {0: Answer("yes")})
    file.append(file.part(1, 2), {1: Answer("no")})
    file.set_aside()
    assert not file.merge()
    assert {path.name for path in data.parent.glob("a.*")} == {"a.jsonl.bak", "a.jsonl.bak.rank1"}


@pytest.mark.parametrize("name", ["pred.jsonl", "pred.json", "answers-of-mine"])
def test_answers_may_lie_in_the_folder_of_the_model(tmp_path: Path, data: Path, name: str) -> None:
    model = export_tiny(tmp_path / "model")
    more = ["--blind", "--answers", str(model / name)]
    assert run(model, data, *more).exit_code == 0
    again = run(model, data, *more)
    assert again.exit_code == 0, again.output


def test_a_digest_changes_with_whatever_belongs_to_the_model(tmp_path: Path) -> None:
    model = export_tiny(tmp_path / "model")
    digest = digest_of_model(str(model))
    for name in ("README.md", "pred.jsonl", "pred.jsonl.lock", "pred.scores.json", "answers-a.json"):
        (model / name).write_text("x")
    assert digest_of_model(str(model)) == digest
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (model / name).write_bytes((model / name).read_bytes() + b" ")
        assert digest != (digest := digest_of_model(str(model))), name
