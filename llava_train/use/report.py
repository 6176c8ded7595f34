"""Questions, references and answers -> scores, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from llava_train.files import written_aside
from llava_train.use.answers import Answer
from llava_train.use.metrics import (
    Metric,
    Parts,
    Score,
    choose,
    in_words,
    judge,
    judge_choices,
    most_frequent,
    scores_of,
)
from llava_train.use.questions import Item

PICTURE, BLANK, MOST_FREQUENT = "picture", "blank", "most frequent"
"""Ways to answer: with the picture, with a blank one, and the answer that most questions of the category have."""


@dataclass(frozen=True)
class Report:
    """The scores of an evaluation: by category (None is all), and then by way of answering."""

    model: str
    data: str
    metric: Metric
    n: int
    skipped: tuple[str, ...]
    """Questions that were left out, and why."""
    scores: Mapping[str | None, Mapping[str, Sequence[Score]]]

    def as_record(self) -> dict[str, Any]:
        """For JSON, a score a row."""
        rows = [
            {"category": category, "way": way, **asdict(score)}
            for category, ways in self.scores.items()
            for way, scores in ways.items()
            for score in scores
        ]
        facts = {"model": self.model, "data": self.data, "metric": self.metric, "n": self.n}
        return {**facts, "skipped": list(self.skipped), "scores": rows}

    def write(self, path: Path) -> None:
        """Writes the scores as JSON."""
        with written_aside(path) as file:
            file.write(json.dumps(self.as_record(), indent=1, ensure_ascii=False) + "\n")

    def table(self) -> Table:
        """The scores with their 95 % intervals, a way of answering a column."""
        ways = list(next(iter(self.scores.values()), {}))
        title = f"{self.metric} of {self.model} on {self.data}, with 95 % confidence intervals"
        table = Table(
            "questions", "n", *ways, title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0
        )
        for category, by_way in self.scores.items():
            rows = list(zip(*by_way.values(), strict=True))
            if not rows:
                continue
            label = "all" if category is None else category, f"{rows[0][0].n:,}"
            if len(rows) == 1:
                table.add_row(*label, *map(in_words, rows[0]), end_section=category is None)
                continue
            table.add_row(*label)
            for row in rows:
                table.add_row(f"  {row[0].name}", "", *map(in_words, row), end_section=row is rows[-1])
        return table


def report_on(
    model: str,
    data: str,
    metric: Metric,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Answer]],
    skipped: Sequence[str] = (),
) -> Report:
    """The scores of answers to `items`, by way of answering. Beside a blank picture stands the most frequent answer."""
    parts = {way: judged(metric, items, given) for way, given in answers.items()}
    if BLANK in answers:
        parts[MOST_FREQUENT] = judged(metric, items, guesses(items))
    groups, categories = [item.group for item in items], [item.category for item in items]
    scores = {}
    for category in [None, *sorted({each for each in categories if each is not None})]:
        chosen = [i for i, each in enumerate(categories) if category in (None, each)]
        of_chosen = [groups[i] for i in chosen]
        scores[category] = {way: scores_of([each[i] for i in chosen], of_chosen) for way, each in parts.items()}
    return Report(model, data, metric, len(items), tuple(skipped), scores)


def judged(metric: Metric, items: Sequence[Item], answers: Sequence[Answer]) -> list[Parts]:
    """What each answer is worth."""
    if metric != "choice":
        return judge(metric, [answer.text for answer in answers], [item.references for item in items])
    chosen = [choose(answer.log_likelihoods, item.options) for item, answer in zip(items, answers, strict=True)]
    return judge_choices(chosen, [item.options.index(item.references[0]) for item in items])


def guesses(items: Sequence[Item]) -> list[Answer]:
    """The most frequent answer of each item's category; of a choice the most frequent place among the options."""
    categories = [item.category for item in items]
    if not any(item.options for item in items):
        return [Answer(text) for text in most_frequent([item.references for item in items], categories)]
    places = most_frequent([[str(item.options.index(item.references[0]))] for item in items], categories)
    return [Answer("", _only(int(place), len(item.options))) for place, item in zip(places, items, strict=True)]


def _only(place: int, n: int) -> tuple[float, ...]:
    """Log-likelihoods by which the option at `place` is chosen."""
    return tuple(0.0 if number == place else -1e9 for number in range(n))
