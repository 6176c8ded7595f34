"""A figure: numbers of one run, or of several upon each other, drawn in their colours with a legend and a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from llava_train.report.read import Line, RunRecord, number, table_of
from llava_train.report.svg import Curve, Name, Point, line_chart, short, step_axis, value_axis

N_COLOURS, N_DASHES = 8, 4
_MOST_ROWS, _FEW_ROWS = 40, 20


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    classes: str
    value: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its legend and its numbers in a table."""

    title: str
    svg: str
    about: str = ""
    legend: Sequence[Key] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Quantity:
    """Numbers of a run that share a figure."""

    title: str
    about: str
    of: Callable[[RunRecord], Sequence[Curve]]
    """The curves of a run, without colours."""
    from_zero: bool = False
    name: Name = short
    of_one_run: Callable[[RunRecord], Sequence[Curve]] | None = None
    """The same with curves that several runs would hide each other with."""

    def figure(self, records: Sequence[RunRecord]) -> Figure | None:
        """None where no run has such numbers."""
        alone = len(records) == 1
        curves = list(coloured(records, (self.of_one_run or self.of) if alone else self.of))
        if not curves:
            return None
        values = [value for curve in curves for _, value in curve.points]
        values += [end for curve in curves for _, *ends in curve.band for end in ends]
        x = step_axis([at for curve in curves for at, _ in curve.points])
        label = f"{self.title}: {', '.join(_in_words(curve, self.name) for curve in curves)}"
        svg = line_chart(curves, label, x, value_axis(values, self.from_zero, self.name))
        header, rows = table(curves, "step", self.name)
        return Figure(self.title, svg, self.about, legend(curves, records, self.name), header, rows)


def coloured(records: Sequence[RunRecord], of: Callable[[RunRecord], Sequence[Curve]]) -> Iterator[Curve]:
    """The curves that have points, each in its colour: that of the curve, or with several runs that of its run."""
    alone = len(records) == 1
    for n_run, record in enumerate(records):
        for n_curve, curve in enumerate(curve for curve in of(record) if curve.points):
            if alone:
                yield replace(curve, colour=n_curve % N_COLOURS, dash=curve.dash or n_curve // N_COLOURS % N_DASHES)
            else:
                yield replace(curve, colour=n_run % N_COLOURS, dash=n_curve % N_DASHES, run=record.name)


def legend(curves: Sequence[Curve], records: Sequence[RunRecord], name: Name) -> list[Key]:
    """Of one run the name of each curve and where it ended; of several each run, and what the dashes mean."""
    if len(records) == 1:
        return [Key(curve.name, curve.classes, name(curve.points[-1][1])) for curve in curves]
    drawn = {curve.colour for curve in curves}
    runs = [Key(r.name, f"c{i % N_COLOURS} d0") for i, r in enumerate(records) if i % N_COLOURS in drawn]
    dashes = {curve.name: Key(curve.name, f"plain d{curve.dash}") for curve in curves}
    return [*runs, *(dashes.values() if len(dashes) > 1 else ())]


def table(curves: Sequence[Curve], x_name: str, name: Name) -> tuple[list[str], list[list[str]]]:
    """The numbers of curves, a row an x. Of many rows some, evenly, and all of curves with few points."""
    by_length = sorted(([x for x, _ in curve.points] for curve in curves), key=len)
    few, many = [at for at in by_length if len(at) <= _FEW_ROWS], [at for at in by_length if len(at) > _FEW_ROWS]
    kept = {x for at in few for x in at}
    if many:  # evenly among the points that most curves have
        n_rows = min(len(many[0]), _MOST_ROWS)
        kept |= {many[0][n * (len(many[0]) - 1) // (n_rows - 1)] for n in range(n_rows)}
    columns = [dict(curve.points) for curve in curves]
    rows = [[f"{x:,.0f}", *(name(column[x]) if x in column else "" for column in columns)] for x in sorted(kept)]
    return [x_name, *(curve.full_name for curve in curves)], rows


def _in_words(curve: Curve, name: Name) -> str:
    first, last = curve.points[0][1], curve.points[-1][1]
    return f"{curve.full_name} from {name(first)} to {name(last)}"


def points_of(lines: Sequence[Line], *keys: str, unit: float = 1.0) -> list[Point]:
    """(step, value) of a key, or of a key within that of an object, where it is a number."""
    found = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = table_of(value).get(key)
        if (known := number(value)) is not None:
            found.append((float(line["step"]), known / unit))
    return found


def averaged(points: Sequence[Point], most: int = 160) -> list[Point]:
    """At most `most` points: the mean of each stretch, where it ends.

    >>> averaged([(1, 2.0), (2, 4.0), (3, 5.0), (4, 7.0)], most=2)
    [(2, 3.0), (4, 6.0)]
    """
    ends = [n * len(points) // most for n in range(most + 1)] if len(points) > most else range(len(points) + 1)
    return [
        (points[end - 1][0], sum(value for _, value in points[begin:end]) / (end - begin))
        for begin, end in pairwise(ends)
    ]
