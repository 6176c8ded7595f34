"""What an answer is worth: metrics as pure functions of answers and references.

    vqa      VQA accuracy (Antol et al. 2015), with its normalisation; ten annotators a question
    exact    the answer is a reference, up to surrounding white space and upper or lower case
    pope     yes or no about objects (POPE, Li et al. 2023): accuracy, precision, recall, F1 and share of yes
    anls     average normalised Levenshtein similarity with threshold 0.5 (Biten et al. 2019)
    caption  CIDEr-D, 0 to 10; 1.2 is what papers print as 120
    choice   the most likely option is the right one, by sum of log-probabilities and by log-probability a byte

A score is a ratio of sums over questions. Each question yields its part of both sums, so that scores by category and
confidence intervals come from the same numbers.
"""

from __future__ import annotations

import typing
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from anls import anls_score

from llava_train.config import TextMetric
from llava_train.use.cider import cider
from llava_train.use.intervals import bootstrap, wilson
from llava_train.use.vqa_normalisation import normalised

Metric = Literal["vqa", "exact", "pope", "anls", "caption", "choice"]
TEXT_METRICS: tuple[TextMetric, ...] = typing.get_args(TextMetric)
METRICS: tuple[Metric, ...] = typing.get_args(Metric)

Parts = Mapping[str, tuple[float, float]]
"""What a question adds to the numerator and the denominator of each score."""

_PROPORTIONS = frozenset({"exact", "accuracy", "accuracy_norm", "precision", "recall", "yes_share"})
"""Scores whose questions are right or wrong: their intervals are Wilson's."""
_HIGHEST = {"cider": 10.0}
_LEAST_ANNOTATORS = 4


@dataclass(frozen=True)
class Score:
    """A score over `n` questions with its 95 % confidence interval. 0 to 1, `cider` 0 to 10."""

    name: str
    value: float
    low: float
    high: float
    n: int


def judge(metric: TextMetric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Parts]:
    """What each answer is worth.

    Args:
        references: of each question, at least one; for `pope` one, `yes` or `no`.
    """
    if metric == "caption":
        return [{"cider": (score, 1.0)} for score in cider(answers, references)]
    judges: dict[str, Callable[[str, Sequence[str]], Parts]] = {
        "vqa": lambda answer, accepted: {"vqa_accuracy": (vqa_accuracy(answer, accepted), 1.0)},
        "exact": lambda answer, accepted: {"exact": (float(is_exact(answer, accepted)), 1.0)},
        "anls": lambda answer, accepted: {"anls": (anls_score(answer, list(accepted), 0.5), 1.0)},
        "pope": lambda answer, label: _confusion(says_yes(answer), label[0] == "yes"),
    }
    return [judges[metric](answer, accepted) for answer, accepted in zip(answers, references, strict=True)]


def judge_choices(chosen: Sequence[tuple[int, int]], right: Sequence[int]) -> list[Parts]:
    """What each choice is worth; `chosen` as `choose` gives them."""
    return [
        {"accuracy": (float(by_sum == index), 1.0), "accuracy_norm": (float(by_byte == index), 1.0)}
        for (by_sum, by_byte), index in zip(chosen, right, strict=True)
    ]


def scores_of(parts: Sequence[Parts], groups: Sequence[Hashable]) -> list[Score]:
    """The scores over questions. A ratio whose denominator is 0, such as precision where nobody said yes, is 0.

    Args:
        groups: of each question, what it shares with others (its picture).
    """
    scores = []
    for name in parts[0] if parts else ():
        above, below = zip(*(each[name] for each in parts), strict=True)
        total = sum(below)
        if name in _PROPORTIONS:
            low, high = wilson(sum(above), total)
        else:
            low, high = bootstrap(above, below, groups, _HIGHEST.get(name, 1.0))
        scores.append(Score(name, sum(above) / total if total else 0.0, low, high, len(parts)))
    return scores


def in_words(score: Score) -> str:
    """`62.0 [60.1, 63.9]`: percent, but CIDEr as it is."""
    scale, digits = (1, 3) if score.name == "cider" else (100, 1)
    value, low, high = (f"{scale * each:.{digits}f}" for each in (score.value, score.low, score.high))
    return f"{value} [{low}, {high}]"


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """min(annotators who said that / 3, 1), averaged over leaving out each annotator in turn.

    Of ten annotators one gives 0.3, two 0.6, three 0.9 and four 1. The answers of both sides are normalised. With fewer
    than four, three others who agree cannot be: then it is the share of annotators who said that, so that a
    single reference is right or wrong.
    """
    given = normalised(answer)
    n, n_same = len(annotators), sum(normalised(said) == given for said in annotators)
    if n < _LEAST_ANNOTATORS:
        return n_same / n
    # Leaving out one of those who said it leaves one less.
    return (n_same * min(1.0, (n_same - 1) / 3) + (n - n_same) * min(1.0, n_same / 3)) / n


def is_exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer is one of `accepted`, up to surrounding white space and case."""
    return answer.strip().casefold() in {each.strip().casefold() for each in accepted}


def says_yes(answer: str) -> bool:
    """How POPE's script reads an answer: no, if a word of the first sentence is No, no or not; else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def choose(log_likelihoods: Sequence[float], options: Sequence[str]) -> tuple[int, int]:
    """The most likely option, by the sum of its log-probabilities and by that sum a byte of its text.

    As `acc` and `acc_norm` of lm-evaluation-harness; `LLaVA.log_likelihoods` counts the end of the turn in.
    """
    by_byte = [sum_ / max(1, len(option.encode())) for sum_, option in zip(log_likelihoods, options, strict=True)]
    numbers = range(len(options))
    return max(numbers, key=lambda i: log_likelihoods[i]), max(numbers, key=lambda i: by_byte[i])


def most_frequent(references: Sequence[Sequence[str]], categories: Sequence[str | None]) -> list[str]:
    """For each question the answer that most questions of its category have: the best guess that looks at nothing."""
    usual: dict[str | None, Counter[str]] = {}
    for accepted, category in zip(references, categories, strict=True):
        usual.setdefault(category, Counter())[Counter(accepted).most_common(1)[0][0]] += 1
    return [usual[category].most_common(1)[0][0] for category in categories]


def _confusion(said_yes: bool, is_yes: bool) -> Parts:
    hit, false_alarm, miss = said_yes and is_yes, said_yes and not is_yes, is_yes and not said_yes
    return {
        "accuracy": (float(said_yes == is_yes), 1.0),
        "precision": (float(hit), float(hit + false_alarm)),
        "recall": (float(hit), float(hit + miss)),
        "f1": (2.0 * hit, 2.0 * hit + false_alarm + miss),
        "yes_share": (float(said_yes), 1.0),
    }
