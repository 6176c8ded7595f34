"""Charts as SVG within a page: curves, stacked shares, histograms.

Own drawing, and not matplotlib's, for three reasons. Colours are the page's (CSS classes), so that a chart is right in
the light and in the dark. Text keeps its size on a phone: a chart is about as wide as a phone in its own units. And a
page is made at the end of each run, in the process that trained: this takes milliseconds, where matplotlib took 0.6 s
for its import (twice that where it makes its font cache) and 0.1 s a chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Protocol

Point = tuple[float, float]
WIDTH, HEIGHT = 320, 190
TEXT_PX = 12
_TOP, _RIGHT, _BOTTOM = 10, 10, 26
_MOST_POINTS = 320
_FEW_POINTS = 12
"""Of so few, each is a dot too."""


@dataclass(frozen=True)
class Curve:
    """A line of a chart, in the colour of the CSS class `cN` and the dashes of `dN`."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    faint: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) of an interval around it."""
    run: str = ""
    """Which of several runs it is of."""

    @property
    def full_name(self) -> str:
        return f"{self.run}, {self.name}" if self.run else self.name

    @property
    def classes(self) -> str:
        return f"c{self.colour} d{self.dash}{' faint' if self.faint else ''}"


@dataclass(frozen=True)
class Axis:
    """Where numbers lie on a side of a chart: from `low` to `high`, of which `ticks` are named."""

    low: float
    high: float
    ticks: Sequence[float]
    name: Callable[[float], str]
    log: bool = False
    unit: str = ""
    """Stands before the ticks of the lower side."""

    def share(self, value: float) -> float:
        """0 at the axis's beginning, 1 at its end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return min(max((at - low) / (high - low), 0.0), 1.0)


class Name(Protocol):
    """How a number is written, with so many significant digits, or as many as are its custom."""

    def __call__(self, value: float, n_digits: int = ...) -> str: ...


def short(value: float, n_digits: int = 4) -> str:
    """A number in a few characters: `12.5k`, `0.03`, `2e-5`."""
    value = float(f"{value:.{n_digits}g}")
    size = abs(value)
    if size and not 1e-3 <= size < 1e12:
        mantissa, exponent = f"{value:.{n_digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / unit:.{n_digits}g}{letter}"
    return f"{value:.{n_digits}g}"


def percent(value: float, n_digits: int = 3) -> str:
    return f"{100 * value:.{n_digits}g}%"


def _exact(name: Name, ticks: Sequence[float]) -> Callable[[float], str]:
    """`name` with as many digits as it takes to write the ticks as they are: alike they would say nothing."""
    enough = (n for n in range(4, 16) if all(float(f"{tick:.{n}g}") == tick for tick in ticks))
    return partial(name, n_digits=next(enough, 16))


def linear_axis(values: Sequence[float], from_zero: bool = False, name: Name = short) -> Axis:
    """An axis that has all values, with round numbers as ticks.

    >>> linear_axis([0.2, 4.1]).ticks
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    low, high = min(values), max(values)
    low, high = (min(low, 0.0), max(high, 0.0)) if from_zero else (low, high)
    if _alike(low, high):
        spare = abs(low) / 2 or 1.0
        low, high = (low, low + 1.0) if from_zero else (low - spare, high + spare)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks, _exact(name, ticks))


def close_axis(values: Sequence[float], unit: str, name: Name = short, least: float = 0.0) -> Axis:
    """An axis that begins and ends with the values; `least` is the least distance of its ticks."""
    low, high = min(values), max(values)
    if _alike(low, high):
        return Axis(low - 0.5, high + 0.5, [low], name, unit=unit)
    step = max(_round_step((high - low) / 4), least)
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = [float(f"{number * step:.12g}") for number in inside]
    return Axis(low, high, ticks, _exact(name, ticks), unit=unit)


def step_axis(values: Sequence[float]) -> Axis:
    """An axis of steps."""
    return close_axis(values, "step", least=1.0)


def value_axis(values: Sequence[float], from_zero: bool = False, name: Name = short) -> Axis:
    """A linear axis; a logarithmic one for values of many sizes, of which few would be seen."""
    smallest, largest = min(values), max(values)
    if from_zero or smallest <= 0 or largest / smallest < 50:
        return linear_axis(values, from_zero, name)
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    every = max(1, round((last - first) / 4))
    return Axis(10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, every)], name, log=True)


def _alike(low: float, high: float) -> bool:
    """Whether numbers differ by no more than rounding, which is nothing to see."""
    return high - low <= 1e-9 * max(abs(low), abs(high))


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points in the same order, with the first, the last, and every peak and dip that shows.

    Of each of `most / 2` stretches the lowest and the highest point are kept.
    """
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    n_stretches = max(1, most // 2 - 1)
    for number in range(n_stretches):
        stretch = range(number * len(points) // n_stretches, (number + 1) * len(points) // n_stretches)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def line_chart(curves: Sequence[Curve], label: str, x: Axis, y: Axis) -> str:
    """Curves over steps. `label` says in words what is seen."""
    frame = Frame(x, y)
    bands = "".join(frame.area(curve.band, f"band c{curve.colour}") for curve in curves if curve.band)
    return frame.svg(label, bands + "".join(map(frame.curve, sorted(curves, key=lambda curve: not curve.faint))))


def stack_chart(layers: Sequence[Curve], label: str, x: Axis, y: Axis) -> str:
    """Areas upon each other; all have the same x."""
    frame, below, drawn = Frame(x, y), [0.0] * len(layers[0].points), []
    for layer in layers:
        above = [low + value for low, (_, value) in zip(below, layer.points, strict=True)]
        edges = [(at, low, high) for (at, _), low, high in zip(layer.points, below, above, strict=True)]
        drawn.append(frame.area(edges, f"stack c{layer.colour}"))
        below = above
    return frame.svg(label, "".join(drawn))


def histogram_chart(curves: Sequence[Curve], label: str, x: Axis, y: Axis) -> str:
    """Bars whose right edge is a point's x and whose height its y; the first begins at the axis's beginning."""
    frame = Frame(x, y)
    drawn = []
    for curve in curves:
        outline, left = [(x.low, 0.0)], x.low
        for right, height in curve.points:
            outline += [(left, height), (right, height)]
            left = right
        path = frame.path([*outline, (left, 0.0)])
        drawn.append(f'<path class="bars c{curve.colour}" d="{path}"/>')
    return frame.svg(label, "".join(drawn))


def _text_width(text: str) -> float:
    """At least what a text takes in the fonts of browsers."""
    return sum({"%": 11.5, ".": 4.0, "-": 5.0, "M": 11.0}.get(character, 7.5) for character in text)


class Frame:
    """Places numbers on a chart and draws its axes."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self.left = max(10 + max(_text_width(y.name(tick)) for tick in y.ticks), 12 + _text_width(x.unit))

    def at(self, x: float, y: float) -> tuple[str, str]:
        """Coordinates as SVG has them."""
        across = self.left + self.x.share(x) * (WIDTH - self.left - _RIGHT)
        down = HEIGHT - _BOTTOM - self.y.share(y) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f}", f"{down:.1f}"

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{across} {down}" for across, down in (self.at(*point) for point in points))

    def curve(self, curve: Curve) -> str:
        points = thinned(curve.points)
        drawn = f'<path class="line {curve.classes}" d="{self.path(points)}"/>' if len(points) > 1 else ""
        if len(points) > _FEW_POINTS:
            return drawn
        for across, down in (self.at(*point) for point in points):
            drawn += f'<circle class="dot {curve.classes}" cx="{across}" cy="{down}" r="2.5"/>'
        return drawn

    def area(self, edges: Sequence[tuple[float, float, float]], classes: str) -> str:
        """What lies between the low and the high edge; `edges` are (x, low, high)."""
        there = thinned([(at, high) for at, _, high in edges])
        back = thinned([(at, low) for at, low, _ in edges])
        return f'<path class="{classes}" d="{self.path([*there, *reversed(back)])}Z"/>'

    def svg(self, label: str, content: str) -> str:
        """The whole chart. The axes lie below its content, so that no grid crosses it."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{self._axes()}{content}</svg>'
        )

    def _axes(self) -> str:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        drawn = []
        for tick in self.y.ticks:
            _, down = self.at(self.x.low, tick)
            drawn.append(f'<path class="grid" d="M{self.left:.1f} {down}H{right}"/>')
            text_at = f'x="{self.left - 6:.1f}" y="{float(down) + 4:.1f}"'
            drawn.append(f'<text {text_at} text-anchor="end">{self.y.name(tick)}</text>')
        for tick in self.x.ticks:
            across, _ = self.at(tick, self.y.low)
            near_end = float(across) > right - 14
            anchor, place = ("end", str(right + 8)) if near_end else ("middle", across)
            drawn.append(f'<path class="grid" d="M{across} {bottom}v4"/>')
            drawn.append(f'<text x="{place}" y="{bottom + 17}" text-anchor="{anchor}">{self.x.name(tick)}</text>')
        drawn.append(f'<text x="{self.left - 10:.1f}" y="{bottom + 17}" text-anchor="end">{self.x.unit}</text>')
        return "".join(drawn)
