"""Metrics equal their published definitions, on published examples and on numbers of the original programs."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.use.cider import cider, tokens
from llava_train.use.intervals import bootstrap, wilson
from llava_train.use.metrics import (
    TEXT_METRICS,
    choose,
    judge,
    judge_choices,
    most_frequent,
    says_yes,
    scores_of,
    vqa_accuracy,
)
from llava_train.use.vqa_normalisation import normalised


def values(metric: Any, answers: list[str], references: list[list[str]]) -> dict[str, float]:
    return {score.name: score.value for score in scores_of(judge(metric, answers, references), range(len(answers)))}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("a cat", "cat"),
        ("The\ncat\ton an  APPLE", "cat on apple"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # wrong in the original
        ("yes.", "yes"),
        ("3.5", "3.5"),
        (".5 cm.", ".5 cm"),
        ("U.S.A.", "usa"),
        ("2,000", "2000"),
        ("2,000-mile", "2000mile"),  # a number with a comma makes every mark vanish
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black-and-white", "black and white"),
        ("half - half", "half half"),
        ("10:30", "10:30"),  # apostrophe and colon are kept
        ("man's", "man's"),
        ("(left)", "left"),
        ("", ""),
    ],
)
def test_vqa_answers_are_normalised_as_the_evaluation_does(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(("n_same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_annotators_is_the_published_table(n_same: int, expected: float) -> None:
    annotators = ["two"] * n_same + [f"other {i}" for i in range(10 - n_same)]
    assert vqa_accuracy("2", annotators) == pytest.approx(expected)


@given(st.integers(4, 12), st.data())
def test_vqa_accuracy_is_the_mean_over_leaving_out_each_annotator(n: int, data: st.DataObject) -> None:
    said = data.draw(st.lists(st.sampled_from(["yes", "no", "maybe"]), min_size=n, max_size=n))
    by_definition = [min(1, (said[:i] + said[i + 1 :]).count("yes") / 3) for i in range(n)]
    assert vqa_accuracy("Yes", said) == pytest.approx(sum(by_definition) / n)


@pytest.mark.parametrize(
    ("annotators", "expected"), [(["a dog"], 1), (["cat"], 0), (["dog", "cat"], 0.5), (["dog"] * 3, 1)]
)
def test_of_fewer_than_four_annotators_vqa_takes_the_share(annotators: list[str], expected: float) -> None:
    assert vqa_accuracy("dog", annotators) == expected


def test_exact_ignores_case_and_surrounding_space_and_nothing_else() -> None:
    answers = [" A Dog\n", "a dog.", "STRASSE", "a  dog"]
    assert values("exact", answers, [["cat", "a dog"], ["a dog"], ["straße"], ["a dog"]]) == {"exact": 0.5}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("Yes, there is a dog.", True),
        ("No", False),
        ("No, there is no dog.", False),
        ("There is not a dog in the image.", False),
        ("I see no dog", False),
        ("Yes. But there is no cat.", True),
        ("There is a dog.", True),
        ("NO", True),  # the script knows these words only
        ("no.", False),
        ("nobody", True),
        ("", True),
    ],
)
def test_pope_reads_answers_as_its_script_does(answer: str, yes: bool) -> None:
    assert says_yes(answer) == yes


def test_pope_counts_as_its_script_does() -> None:
    answers = ["Yes"] * 4 + ["No"] * 4
    labels = [["yes"]] * 3 + [["no"]] + [["no"]] * 2 + [["yes"]] * 2
    measured = values("pope", answers, labels)
    assert measured == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_share": 0.5}
    )
    assert values("pope", ["No"], [["yes"]])["precision"] == 0.0


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("ITC Limited", ["itc limited"], 1),
        ("itc  limitd", ["itc limited", "something else"], 10 / 11),
        ("Denver", ["Denver Broncos"], 0),  # a distance of 8 / 14 is not below the threshold
        ("ab", ["ax"], 0),  # nor is one half
        ("abc", ["abx"], 2 / 3),
        ("", ["x"], 0),
    ],
)
def test_anls_follows_its_definition(answer: str, accepted: list[str], expected: float) -> None:
    assert values("anls", [answer], [accepted]) == {"anls": pytest.approx(expected)}


CAPTIONS = ["a man rides a brown horse on the beach", "two dogs play with a red ball", "a plate of food"]
CAPTION_REFERENCES = [
    ["a man is riding a horse on a beach", "a person rides a brown horse along the beach"],
    ["two dogs are playing with a red ball in the grass", "a pair of dogs play"],
    ["a plate of pasta and salad on a table", "food on a white plate"],
]


def test_cider_equals_pycocoevalcap() -> None:
    scores = cider(CAPTIONS, CAPTION_REFERENCES)
    assert scores == pytest.approx([3.18367170503313, 2.4547149082827593, 1.8694768736580074])  # pycocoevalcap 1.2
    assert values("caption", CAPTIONS, CAPTION_REFERENCES) == {"cider": pytest.approx(2.502621162324632)}


def test_cider_by_hand() -> None:
    """Two pictures. `red` and `red cat` are in one document (weight log 2), `cat` in both (weight 0).

    Only n = 1 and 2 have n-grams. n = 1: `red` against `red` is 1; n = 2: `red cat` against `red cat` is 1; n = 3 and 4
    give 0. So 10 * (1 + 1) / 4 = 5, and for a caption of one word less, of which n = 1 alone is left, 10 / 4 *
    exp(-1 / 72).
    """
    assert cider(["red cat", "cat"], [["red cat"], ["cat"]]) == pytest.approx([5, 0])
    assert cider(["red", "cat"], [["red cat"], ["cat"]]) == pytest.approx([2.5 * math.exp(-1 / 72), 0])


def test_cider_of_the_references_themselves_is_ten_and_of_one_picture_zero() -> None:
    references = [["one two three four"], ["five six seven eight"]]
    assert cider([each[0] for each in references], references) == pytest.approx([10, 10])
    assert cider(["one two three four"], references[:1]) == [0]
    assert cider(["", "?"], references) == [0, 0]


@pytest.mark.parametrize(
    ("caption", "expected"),  # what Stanford's PTBTokenizer gives, without its punctuation
    [
        ("A man's hat isn't red.", "a man 's hat is n't red"),
        ("A black-and-white photo of a T-shirt, 3.5-inch", "a black-and-white photo of a t-shirt 3.5-inch"),
        ("She’s at 5 o'clock; it can't wait!", "she 's at 5 o'clock it ca n't wait"),
        ('The sign says "STOP" - the kids\' toys cannot', "the sign says stop the kids toys can not"),
        ("10,000 people at 10:30, 50% off", "10,000 people at 10:30 50 % off"),
        ("a man . standing on  a hill ,", "a man standing on a hill"),
    ],
)
def test_captions_are_cut_as_coco_does(caption: str, expected: str) -> None:
    assert " ".join(tokens(caption)) == expected


def test_a_choice_is_by_sum_and_by_byte() -> None:
    options = ["no", "absolutely yes", "née"]
    assert choose([-2.0, -7.0, -9.0], options) == (0, 1)  # -1, -0.5 and -2.25 a byte
    scores = scores_of(judge_choices([(0, 1), (2, 2)], [1, 2]), ["a", "b"])
    assert [(score.name, score.value, score.n) for score in scores] == [("accuracy", 0.5, 2), ("accuracy_norm", 1, 2)]


def test_the_most_frequent_answer_is_of_the_category() -> None:
    references = [["red", "red", "blue"], ["blue"], ["red"], ["2"], ["3"], ["3"]]
    assert most_frequent(references, [None] * 3 + ["count"] * 3) == ["red"] * 3 + ["3"] * 3


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
@pytest.mark.parametrize(
    ("n_right", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_gives_published_intervals(n_right: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson(n_right, n) == pytest.approx(expected, abs=5e-5)


def test_the_bootstrap_draws_groups() -> None:
    """40 questions on 4 pictures, right for half of the pictures: an interval as of 4 questions, not of 40."""
    right = [float(i < 20) for i in range(40)]
    alone = bootstrap(right, [1.0] * 40, range(40))
    grouped = bootstrap(right, [1.0] * 40, [i // 10 for i in range(40)])
    assert alone == pytest.approx((0.35, 0.65), abs=0.03)  # 0.5 -+ 1.96 * sqrt(0.25 / 40)
    assert grouped == (0, 1)
    assert bootstrap(right, [1.0] * 40, range(40)) == alone


def test_few_questions_that_agree_do_not_make_a_score_certain() -> None:
    assert bootstrap([1.0] * 20, [1.0] * 20, range(20)) == pytest.approx(wilson(20, 20))
    assert bootstrap([0.0] * 20, [1.0] * 20, range(20), highest=10) == pytest.approx((0, 1.611), abs=5e-4)


def test_most_bootstrap_intervals_hold_the_true_f1() -> None:
    """F1 of precision and recall 0.8 is 0.8; of 60 samples of 200 questions at least 52 intervals hold it."""
    rng, n_held = random.Random(0), 0
    for _ in range(60):
        labels = [rng.random() < 0.5 for _ in range(200)]
        answers = ["Yes" if label == (rng.random() < 0.8) else "No" for label in labels]
        parts = judge("pope", answers, [["yes" if label else "no"] for label in labels])
        f1 = next(score for score in scores_of(parts, range(200)) if score.name == "f1")
        n_held += f1.low <= 0.8 <= f1.high
    assert n_held >= 52


ANSWERS = st.sampled_from(["yes", "No", "two dogs", "2 dogs", "a red ball", "", "not so"])
QUESTIONS = st.lists(
    st.tuples(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=10), st.integers(0, 3)), min_size=1, max_size=12
)


@pytest.mark.parametrize("metric", TEXT_METRICS)
@given(questions=QUESTIONS, data=st.data())
def test_scores_lie_in_their_intervals_and_do_not_depend_on_the_order(
    metric: Any, questions: list[tuple[str, list[str], int]], data: st.DataObject
) -> None:
    if metric == "pope":
        questions = [(answer, ["yes" if len(said) % 2 else "no"], group) for answer, said, group in questions]
    highest = 10 if metric == "caption" else 1
    answers, references, groups = zip(*questions, strict=True)
    scores = scores_of(judge(metric, answers, references), groups)
    for score in scores:
        assert -1e-9 <= score.low <= score.high <= highest + 1e-9
        assert score.low - 1e-9 <= score.value <= score.high + 1e-9 or len(set(groups)) < 4  # few groups, rough draws
    mixed = data.draw(st.permutations(questions))
    answers, references, groups = zip(*mixed, strict=True)
    again = scores_of(judge(metric, answers, references), groups)
    assert [score.value for score in again] == pytest.approx([score.value for score in scores])


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_grows_with_what_is_right_and_narrows_with_questions(n_right: int, n_more: int) -> None:
    n = n_right + n_more
    low, high = wilson(n_right, n)
    assert 0 <= low <= n_right / n <= high <= 1
    assert wilson(n_right + 1, n) > (low, high)
    wider = wilson(10 * n_right, 10 * n)
    assert wider[1] - wider[0] < high - low


@given(st.lists(ANSWERS, min_size=1, max_size=10), ANSWERS)
def test_another_annotator_who_agrees_never_lowers_vqa_accuracy(said: list[str], answer: str) -> None:
    if len(said) != 3:  # where the share gives way to leaving one out
        assert vqa_accuracy(answer, [*said, answer]) >= vqa_accuracy(answer, said) - 1e-9
