"""What a page tells of runs in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from llava_train.report.facts import bad_steps, differences, duration, facts, left_out, state_of
from llava_train.report.questions import questions
from llava_train.report.read import read_run
from tests.report.runs import HOSTILE, answer, evaluation, line, record, write_lines, write_run


def test_a_run_in_a_few_numbers(tmp_path: Path) -> None:
    assert facts(record(tmp_path / "run")) == {
        "Steps": "60 of 60",
        "Time": "2 min 39 s",
        "Last logged": "2026-09-21 14:15 UTC",
        "Training loss": "1.000",
        "Held-out loss": "4.500 → 1.500",
        "Score (vqa)": "0.200 → 0.800",
        "Tokens a second": "1800",
        "Samples a second": "4",
        "MFU": "44.5%",
        "Peak memory": "61.0 GiB",
        "Samples left out": "3",
        "Steps skipped": "1",
        "Ranks": "2",
    }


def test_what_is_not_known_is_left_out_of_the_facts(tmp_path: Path) -> None:
    told = facts(record(tmp_path / "run", [{"step": 5, "loss": 1.25}, evaluation(5, eval_loss=3.0)], about={}))
    assert told == {"Steps": "5", "Training loss": "1.250", "Held-out loss": "3.000", "Score (vqa)": "0.250"}
    assert facts(record(tmp_path / "new", [evaluation(0)], about={}))["Steps"] == "0"


def test_speed_is_typical_and_not_that_of_the_first_steps(tmp_path: Path) -> None:
    lines = [line(10 * n, tokens_per_s=speed) for n, speed in enumerate([1.0, 500.0, 502.0, 9000.0], start=1)]
    assert facts(record(tmp_path / "run", lines))["Tokens a second"] == "502"


def test_the_state_says_how_far_a_run_is(tmp_path: Path) -> None:
    under_way = record(tmp_path / "a", [line(10)])
    assert state_of(under_way, ended=False) == "step 10 of 60"
    assert state_of(under_way, ended=True) == "stopped after step 10 of 60"
    assert state_of(record(tmp_path / "b", complete=True), ended=True) == "complete"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5.789e-4, "0.58 ms"),
        (0.0277, "28 ms"),
        (4.21, "4.21 s"),
        (59.96, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_was_left_out_is_counted_by_kind_with_examples(tmp_path: Path) -> None:
    [kind] = left_out(record(tmp_path / "run"))
    assert (kind["kind"], kind["count"]) == ("an image that is missing", 5)
    assert [each["id"] for each in kind["examples"]] == ["lost-1", "lost-2", "lost-3"]
    [shown], n_more = bad_steps(record(tmp_path / "again"))
    assert shown == {"step": 30, "loss": "not finite", "grad_norm": "3.5", "samples": HOSTILE}
    assert n_more == 0


def test_what_was_left_out_is_cut_where_it_is_long(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_lines(
        run / "quarantine.jsonl", [{"step": 1, "kind": "image_missing", "id": "i" * 9999, "reason": ["r"] * 9999}]
    )
    [kind] = left_out(read_run(run))
    assert max(map(len, kind["examples"][0].values())) < 310


def test_keys_that_differ_are_listed_with_the_value_of_each_run(tmp_path: Path) -> None:
    about = {"torch": "2.13.0", "n_ranks": 8, "data": [{"path": "data.json", "n_samples": 99}]}
    batch = {"size": 16, "max_tokens": 2048, "max_sample_tokens": 640}
    first, second = record(tmp_path / "a"), record(tmp_path / "b", batch=batch, about=about, eval=None)
    assert dict(differences([first, second])) == {
        "name": ["a", "b"],
        "batch.size": ["8", "16"],
        "eval.every": ["20", "not set"],
        "eval.metric": ["vqa", "not set"],
        "about.n_ranks": ["2", "8"],
        "eval": ["not set", "null"],
    }
    assert differences([first, first]) == []


# Answers.


def test_a_question_has_its_answers_before_and_after_training(tmp_path: Path) -> None:
    [colour, hostile], n_more = questions([record(tmp_path / "run", complete=True)])
    assert n_more == 0
    assert (colour.prompt, colour.expected) == ("What colour?", "Red")
    hostile_answer = ("before training", HOSTILE, False)
    assert colour.answers == [hostile_answer, ("after training", "red", True)], "the one between is not shown"
    assert hostile.answers == [("after training", "red", True)]
    assert len(colour.pictures) == 1 and colour.pictures[0].startswith("data:image/jpeg;base64,")
    assert hostile.pictures == []


def test_questions_of_two_sources_that_share_an_id_and_a_prompt_stay_two(tmp_path: Path) -> None:
    answers = [answer(step, expected=expected) for step in (0, 60) for expected in ("Red", "A dog")]
    found, _ = questions([record(tmp_path / "run", None, answers)])
    assert [(each.expected, len(each.answers)) for each in found] == [("Red", 2), ("A dog", 2)]


def test_answers_of_several_runs_stand_side_by_side_under_the_same_question(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a"), record(tmp_path / "b", answers=[answer(0), answer(60, "other")])]
    [colour, _, other], _ = questions(runs)
    assert [when for when, _, _ in colour.answers] == ["a, before training", "a, after step 60", "b, before training"]
    assert [when for when, _, _ in other.answers] == ["b, after step 60"]


def test_pictures_outside_the_run_or_of_another_kind_are_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "pictures/link.jpg", "config.yaml", "pictures/none.jpg", 5]
    names += ["pictures/pipe.jpg", "pictures", "pictures/\0.jpg"]
    run = record(tmp_path / "run", answers=[answer(0, pictures=names), answer(60, "text", pictures="x")])
    (run.folder / "pictures/link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(run.folder / "pictures/pipe.jpg")
    assert [question.pictures for question in questions([run])[0]] == [[], []]


def test_many_questions_are_cut_and_counted(tmp_path: Path) -> None:
    run = record(tmp_path / "run", answers=[answer(60, str(n), answer="a\x16" * 5000) for n in range(50)])
    shown, n_more = questions([run])
    assert (len(shown), n_more) == (40, 10)
    [(_, text, _)] = shown[0].answers
    assert text.startswith("a\ufffda\ufffd") and len(text) < 2010
