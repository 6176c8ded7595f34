"""Evaluating a tiny model: formats, baselines, wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_train.use.evaluate import Evaluation, evaluate
from llava_train.use.llava import LLaVA, Question, question_about
from llava_train.use.questions import QuestionError, read_questions
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


def test_answers_are_those_of_the_model_in_the_format_of_llava(model: Path, data: Path) -> None:
    done = run(model, data, "--json")
    assert done.exit_code == 0, done.output
    llava, rows = LLaVA.from_pretrained(model, "cpu"), read_lines(data)
    answers = read_lines(data.parent / "a.jsonl")
    assert [answer.keys() for answer in answers] == [
        {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    ] * N
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [
        (row["question_id"], row["text"]) for row in rows
    ]
    alone = [llava.generate_from_image(data.parent / r["image"], r["text"], max_new_tokens=5) for r in rows]
    assert [answer["text"] for answer in answers] == alone
    assert len({answer["answer_id"] for answer in answers}) == N
    report = json.loads(done.stdout)
    assert report == json.loads((data.parent / "a.scores.json").read_text())
    names = [score["name"] for score in report["scores"] if score["category"] is None]
    assert names == ["accuracy", "precision", "recall", "f1", "yes_share"]
    assert {score["category"]: score["n"] for score in report["scores"]} == {None: N, "popular": 3, "random": 4}


def test_blind_shows_both_baselines_beside_each_score(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []
    generate = LLaVA.generate
    monkeypatch.setattr(LLaVA, "generate", lambda self, qs, **more: asked.extend(qs) or generate(self, qs, **more))
    report = evaluate(Evaluation(str(model), data, "pope", answers=data.parent / "a.jsonl", blind=True))
    assert report is not None
    assert list(report.scores[None]) == ["picture", "blank", "most frequent"]
    best = {score.name: score.value for score in report.scores[None]["most frequent"]}
    assert best["accuracy"] == 1  # the label of each category is always the same here
    blank, mean = asked[N:], tuple(int(255 * share) for share in (0.48145466, 0.4578275, 0.40821073))
    for question in blank:
        [(_, colour)] = question.images[0].getcolors()
        assert colour == mean
    assert len(read_lines(data.parent / "a.blank.jsonl")) == N
    shown = run(model, data, "--blind", "--max-new-tokens", "128")
    assert len(asked) == 2 * N, "nothing was asked again"
    assert "most frequent" in shown.stdout and re.search(r"random +4", shown.stdout)
    assert "100.0 [64.6, 100.0]" in shown.stdout


def test_a_question_that_comes_again_is_asked_once_about_a_blank_picture(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(data, [{**row, "text": "Is it?" if row["question_id"] % 2 else "Is it red?"} for row in read_lines(data)])
    n_asked = 0
    generate = LLaVA.generate

    def counted(self: LLaVA, questions: Any, **more: Any) -> list[str]:
        nonlocal n_asked
        n_asked += len(questions)
        return generate(self, questions, **more)

    monkeypatch.setattr(LLaVA, "generate", counted)
    evaluate(Evaluation(str(model), data, "pope", answers=data.parent / "a.jsonl", blind=True, max_new_tokens=5))
    assert n_asked == N + 2
    blank = LLaVA.from_pretrained(model, "cpu")
    colour = tuple(int(255 * share) for share in (0.48145466, 0.4578275, 0.40821073))
    for row, answer in zip(read_lines(data), read_lines(data.parent / "a.blank.jsonl"), strict=True):
        picture = Image.new("RGB", Image.open(data.parent / row["image"]).size, colour)
        assert answer["text"] == blank.generate_from_image(picture, row["text"], max_new_tokens=5)


def test_a_limited_evaluation_is_continued_by_a_whole_one(model: Path, data: Path) -> None:
    first = run(model, data, "--limit", "3", "--json")
    assert json.loads(first.stdout)["n"] == 3
    before = read_lines(data.parent / "a.jsonl")
    assert json.loads(run(model, data, "--json").stdout)["n"] == N
    assert read_lines(data.parent / "a.jsonl")[:3] == before
    assert json.loads(run(model, data, "--limit", "3", "--json").stdout)["n"] == 3
    assert len(read_lines(data.parent / "a.jsonl")) == N


def test_training_data_is_asked_pair_by_pair(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Where?"), ("gpt", "Here.")]
    conversation = [{"from": who, "value": value} for who, value in turns]
    rows = [
        {"id": "x", "image": "a.png", "conversations": conversation, "categories": ["what", "where"]},
        {"id": "y", "conversations": conversation[2:]},
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    items = read_questions(tmp_path / "held_out.json", "exact")
    assert [(item.id, item.prompt, item.references, item.category) for item in items] == [
        ("x-0", "What is it?", ("A dog.",), "what"),
        ("x-1", "Where?", ("Here.",), "where"),
        ("y", "Where?", ("Here.",), None),
    ]
    assert [item.turns[-1].text for item in items] == ["<image>\nWhat is it?", "<image>\nWhere?", "Where?"]
    done = run(model, tmp_path / "held_out.json", metric="exact")
    assert done.exit_code == 0, done.output
    assert "where" in done.stdout


@pytest.mark.parametrize("categories", [[], None])
def test_questions_without_a_category_have_none(tmp_path: Path, categories: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]}
    (item,) = read_questions(write(tmp_path / "q.jsonl", [{**row, "categories": categories}]), "exact")
    assert item.category is None


def test_what_a_table_has_not_is_missing(tmp_path: Path) -> None:
    nothing = float("nan")
    row = {"text": "", "question": "What?", "answer": "a", "answers": nothing, "category": nothing, "id": nothing}
    (item,) = read_questions(write(tmp_path / "q.jsonl", [row]), "exact")
    assert (item.prompt, item.references, item.category, item.id) == ("What?", ("a",), None, 0)


def test_a_chat_template_is_the_one_of_the_answers(model: Path, data: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(LLaVA.from_pretrained(model, "cpu", chat_template="vicuna_v1").processor.chat_template)
    for given in ("vicuna_v1", str(template)):
        path = tmp_path / f"{Path(given).stem}.jsonl"
        assert run(model, data, "--chat-template", given, "--answers", str(path)).exit_code == 0
        llava = LLaVA.from_pretrained(model, "cpu", chat_template=given)
        for row, answer in zip(read_lines(data), read_lines(path), strict=True):
            picture = data.parent / row["image"]
            assert answer["text"] == llava.generate_from_image(picture, row["text"], max_new_tokens=5)
    path = tmp_path / "own.jsonl"
    template.write_text(template.read_text() + " ")
    for changed in ([], ["--chat-template", "vicuna_v1"], ["--chat-template", str(template)]):
        assert "\n  chat_template: " in run(model, data, *changed, "--answers", str(path)).stderr


def test_questions_may_share_an_id_as_those_of_textvqa_do(model: Path, tmp_path: Path) -> None:
    annotated = [{"answer": "two", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    rows = [{"question_id": "x", "text": text, "answers": annotated} for text in ("How many?", "Which number?")]
    done = run(model, write(tmp_path / "q.jsonl", rows), "--json", metric="vqa")
    assert json.loads(done.stdout)["n"] == 2, done.output
    assert [row["prompt"] for row in read_lines(tmp_path / "a.jsonl")] == ["How many?", "Which number?"]


def test_a_question_is_asked_with_the_pictures_so_far(tmp_path: Path) -> None:
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Like <image>?"), ("gpt", "No.")]
    conversation = [{"from": who, "value": value} for who, value in turns]
    (tmp_path / "a.json").write_text(
        json.dumps([{"id": "x", "image": ["a.png", "b.png"], "conversations": conversation}])
    )
    first, second = read_questions(tmp_path / "a.json", "exact", suffix="Be brief.")
    assert first.turns[-1].text == "<image>\nWhat is it?\nBe brief." and len(first.pictures) == 1
    assert second.turns[-1].text == "<image>\nLike <image>?\nBe brief." and len(second.pictures) == 2
    assert first.prompt == "What is it?\nBe brief."
    assert first.group != second.group


def test_questions_about_one_picture_are_a_group_and_others_are_not(tmp_path: Path) -> None:
    rows = [{"text": "?", "answer": "a", **image} for image in ({"image": "a.png"}, {"image": "a.png"}, {}, {})]
    groups = [item.group for item in read_questions(write(tmp_path / "q.jsonl", rows), "exact")]
    assert groups[0] == groups[1] and len(set(groups)) == 3


def test_a_choice_is_made_by_likelihood(model: Path, data: Path) -> None:
    options = ["a", "some very long option indeed", "ball"]
    rows = [{**row, "options": options, "answer": number % 3} for number, row in enumerate(read_lines(data))]
    done = run(model, write(data, rows), "--blind", "--json", metric="choice")
    assert done.exit_code == 0, done.output
    llava = LLaVA.from_pretrained(model, "cpu")
    answers = read_lines(data.parent / "a.jsonl")
    for answer, row in zip(answers, rows, strict=True):
        picture = Image.open(data.parent / row["image"])
        (sums, _) = zip(*llava.log_likelihoods(question_about(picture, row["text"]), options), strict=True)
        assert answer["metadata"]["log_likelihoods"] == pytest.approx(sums, abs=1e-3)
        assert answer["text"] == options[max(range(3), key=sums.__getitem__)]
    assert {score["name"] for score in json.loads(done.stdout)["scores"]} == {"accuracy", "accuracy_norm"}
    assert run(model, data, "--blind", "--json", metric="choice").stdout == done.stdout  # from the file


@pytest.mark.parametrize(
    ("answer", "options", "right"),
    [
        ("cat", ["dog", "cat"], "cat"),
        (1, ["dog", "cat"], "cat"),
        ("B", ["dog", "cat"], "cat"),
        ("A", ["A", "B"], "A"),
        ("2", ["1", "2", "3"], "2"),
        (3, ["1", "2", "3"], "3"),
        (0, ["0", "1"], "0"),
        (0, ["one", "two"], "one"),
        (1, ["B", "A"], "A"),
        (2, {"1": "dog", "2": "cat"}, "cat"),
        ("a", ["a", "A"], "a"),
        ("b", {"a": "dog", "b": "cat"}, "cat"),
    ],
)
def test_the_right_option_is_a_text_a_number_or_a_letter(tmp_path: Path, answer: Any, options: Any, right: str) -> None:
    path = write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "options": options, "answer": answer}])
    assert read_questions(path, "choice")[0].references == (right,)


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (
            2,
            ["1", "2", "3"],
            "answer: 2 may mean '3' (by its number from 0) or '2' (by its text); write '2' for '2' or",
        ),
        (0, ["1", "0"], "answer: 0 may mean '1' (by its number from 0) or '0' (by its text); write '1' for '1' or '0'"),
        (1, ["2", "3", "1.0"], "answer: 1 may mean '3' (by its number from 0) or '1.0' (by its text); write '3' for"),
        (
            "A",
            ["B", "A"],
            "answer: 'A' may mean 'B' (by its letter) or 'A' (by its text); write 0 for 'B' or 1 for 'A'",
        ),
        ("A", ["b", "a"], "answer: 'A' may mean 'b' (by its letter) or 'a' (by its text); write 'b' for 'b' or 'a'"),
        (
            "B",
            {"A": "B", "B": "A"},
            "answer: 'B' may mean 'A' (by its letter) or 'B' (by its text); write 0 for 'B' or 1 for 'A'",
        ),
        (1, {"1": "dog", "2": "cat"}, "answer: 1 may mean 'cat' (by its number from 0) or 'dog' (by its letter)"),
        (
            "0",
            {"0": "1", "1": "0"},
            "answer: '0' may mean '1' (by its letter) or '0' (by its text); write the options as",
        ),
        ("b", ["B", "C"], "answer: 'b' is none of the options"),
        (True, ["no", "yes"], "answer: True is none of the options"),
    ],
)
def test_an_answer_that_may_mean_two_options_is_refused(
    tmp_path: Path, answer: Any, options: Any, message: str
) -> None:
    path = write(tmp_path / "q.jsonl", [{"question_id": 1, "text": "?", "options": options, "answer": answer}])
    with pytest.raises(QuestionError) as raised:
        read_questions(path, "choice")
    assert f"{path}:1: " in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("metric", "row", "message"),
    [
        ("vqa", {"image": "a.png"}, 'no question: wanted "text"'),
        ("vqa", {"text": "What?"}, "metric vqa measures by answers or answer, which is missing"),
        ("vqa", {"text": "What?", "answers": [None]}, "answers: [None] is neither a text nor a list of texts"),
        ("pope", {"text": "What?", "label": "maybe"}, """label: 'maybe'; wanted "yes" or "no\""""),
        ("caption", {"text": "What?", "captions": []}, "captions or caption or answers or answer, which is missing"),
        ("choice", {"text": "What?", "answer": "a"}, "options: wanted two or more different texts"),
        ("choice", {"text": "What?", "options": ["a", "a"], "answer": "a"}, "options: wanted two or more different"),
        ("choice", {"text": "What?", "options": ["a", "b"], "answer": 2}, "answer: 2 is none of the options"),
        ("exact", {"text": "What?", "image": "../a.png", "answer": "a"}, "leaves the image folder"),
        ("exact", {"text": "What? <image>", "answer": "a"}, "1 <image> placeholders, but 0 images"),
        ("exact", {"conversations": []}, '"conversations" is missing, empty or not a list'),
        ("exact", {"text": "What\ud800?", "answer": "a"}, "text holds half of a character"),
        ("choice", {"text": "What?", "options": ["a", "\udc00"], "answer": "a"}, "options holds half of a character"),
        ("exact", {"text": "What?", "answer": "a", "question_id": "\ud800"}, "id holds half of a character"),
        ("exact", {"text": "What?", "answer": "a", "category": "\ud800"}, "category holds half of a character"),
        ("exact", {"text": "What?", "answer": float("nan")}, "answers or answer, which is missing"),
        ("vqa", {"text": "What?", "answers": ["a", float("nan")]}, "is neither a text nor a list of texts"),
        ("exact", {"text": "What?", "answer": "a", "instruction": "In a word."}, "an instruction that no turn has"),
    ],
)
def test_a_wrong_question_is_told_with_file_and_line(
    tmp_path: Path, metric: Any, row: dict[str, Any], message: str
) -> None:
    good = {"text": "What?", "answer": "yes", "options": ["yes", "no"]}
    path = write(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(QuestionError) as raised:
        read_questions(path, metric)
    assert f"{path}:2: " in str(raised.value) and message in str(raised.value)


def test_questions_are_read_before_the_model_is(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"text": "What?"}])
    refused = run(tmp_path / "no-such-model", path, metric="exact")
    assert refused.exit_code == 2 and "q.jsonl:1: metric exact measures by" in refused.stderr
    assert "none.jsonl: there is no such file" in run(tmp_path / "no-such-model", tmp_path / "none.jsonl").stderr
    assert "pictures: there is no such file or folder" in run(tmp_path, path, "--images", "pictures").stderr


@pytest.mark.parametrize("spoilt", ["picture", "text"])
def test_what_cannot_be_asked_is_named_or_left_out(model: Path, data: Path, spoilt: str) -> None:
    if spoilt == "picture":
        (data.parent / "images/1.png").write_bytes(b"no picture")
        bad, message = [102, 103], "not a readable image"
    else:
        rows = read_lines(data)
        rows[2]["text"] = "Is <|im_end|> there?"
        write(data, rows)
        bad, message = [102], "control token"
    refused = run(model, data)
    assert refused.exit_code == 2 and "--skip-bad" in refused.stderr
    assert message in refused.stderr and any(
        f"pope.jsonl:{id_ - 99}: question {id_}: " in refused.stderr for id_ in bad
    )
    done = run(model, data, "--skip-bad", "--json")
    report = json.loads(done.stdout)
    assert report["n"] == N - len(bad)
    assert sorted(int(reason.split("question ")[1][:3]) for reason in report["skipped"]) == bad
    assert {row["question_id"] for row in read_lines(data.parent / "a.jsonl")}.isdisjoint(bad)


def test_a_score_over_no_question_is_refused(model: Path, data: Path) -> None:
    for picture in (data.parent / "images").iterdir():
        picture.write_bytes(b"no picture")
    done = run(model, data, "--skip-bad", "--json")
    assert done.exit_code == 2 and not done.stdout
    assert f"none of the {N} questions can be asked" in done.stderr and "not a readable image" in done.stderr
    assert not list(data.parent.glob("*scores*"))


def test_answers_lie_in_the_folder_of_the_run(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Evaluation(str(model), data, "pope")
    assert plan.answers_path("picture") == Path(f"answers-{model.parent.name}-pope.jsonl")
    (model.parent / "config.yaml").touch()
    try:
        for name in (model, model.parent):
            assert (
                Evaluation(str(name), data, "pope").answers_path("blank") == model.parent / "answers-pope.blank.jsonl"
            )
        assert Evaluation(str(model), data, "pope").scores_path == model.parent / "answers-pope.scores.json"
    finally:
        (model.parent / "config.yaml").unlink()
    assert Evaluation("llava-hf/llava-1.5-7b-hf", data, "pope").name == "llava-1.5-7b-hf"


def test_a_misnamed_picture_is_not_left_out_in_silence(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "q.jsonl", [{"question_id": 1, "img": "a.png", "text": "What?", "answer": "x"}])
    done = run(model, data, metric="exact")
    assert done.exit_code == 2
    assert f'{data}:1: key "img" names a picture, but is not read' in done.output


def test_answers_never_replace_their_questions(model: Path, data: Path) -> None:
    before = data.read_bytes()
    done = run(model, data, "--answers", str(data), "--overwrite")
    assert done.exit_code == 2 and "holds the questions" in done.output
    assert data.read_bytes() == before


def test_pictures_in_another_place_are_asked_for(model: Path, data: Path) -> None:
    (data.parent / "empty").mkdir()
    refused = run(model, data, "--images", str(data.parent / "empty"))
    assert refused.exit_code == 2
    assert f"the image file is missing; is --images {data.parent}/empty right?" in refused.stderr
    refused = run(model, data, "--images", str(data.parent / "empty"), "--skip-bad")
    assert refused.exit_code == 2 and not (data.parent / "a.scores.json").exists()
    assert f"none of the {N} questions can be asked" in refused.stderr
    assert f"is --images {data.parent}/empty right?" in refused.stderr
    (data.parent / "images").rename(data.parent / "pictures")
    assert "name the folder of the pictures (--images)" in run(model, data).stderr
