"""Charts show their numbers where they are, whatever the numbers are."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.report.svg import (
    HEIGHT,
    WIDTH,
    Axis,
    Curve,
    Frame,
    close_axis,
    histogram_chart,
    line_chart,
    linear_axis,
    percent,
    short,
    stack_chart,
    step_axis,
    thinned,
    value_axis,
)

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-9)
POINTS = st.lists(NUMBERS, min_size=1, max_size=500).map(lambda values: list(enumerate(values)))


@given(st.lists(NUMBERS, min_size=1), st.booleans())
def test_an_axis_has_all_values_and_a_few_round_ticks(values: list[float], from_zero: bool) -> None:
    for axis in (linear_axis(values, from_zero), value_axis(values, from_zero)):
        unseen = 1e-6 * (axis.high - axis.low)
        assert axis.low < axis.high
        assert axis.low <= min(values) + unseen and max(values) <= axis.high + unseen
        assert 2 <= len(axis.ticks) <= 8
        assert list(axis.ticks) == sorted(set(axis.ticks))
        assert axis.low <= axis.ticks[0] and axis.ticks[-1] <= axis.high
        assert not from_zero or axis.low <= 0


def test_ticks_are_round() -> None:
    assert linear_axis([0.2, 4.1]).ticks == [0, 1, 2, 3, 4, 5]
    assert linear_axis([5.74, 5.768]).ticks == [5.74, 5.75, 5.76, 5.77]
    assert step_axis([1, 8]).ticks == [2, 4, 6, 8]
    assert step_axis([1, 2]).ticks == [1, 2], "no half steps"
    assert close_axis([0, 1], "").ticks == [0, 0.25, 0.5, 0.75, 1]
    assert value_axis([0.1, 20]).ticks == [0.1, 1, 10, 100] and value_axis([0.1, 20]).log


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.7401, 5.7405], ["5.7401", "5.7402", "5.7403", "5.7404", "5.7405"]),
        ([1e-5, 2e-5], ["1e-5", "1.25e-5", "1.5e-5", "1.75e-5", "2e-5"]),
        ([100, 101], ["100", "100.25", "100.5", "100.75", "101"]),
    ],
)
def test_ticks_are_named_as_they_are_however_close(values: list[float], expected: list[str]) -> None:
    axis = value_axis(values)
    assert [axis.name(tick) for tick in axis.ticks] == expected


@pytest.mark.parametrize("value", [0.1, 2e-5, -5.74, 1e12])
def test_numbers_that_differ_by_rounding_alone_are_drawn_as_one(value: float) -> None:
    values = [value, math.nextafter(value, math.inf)]
    axis = value_axis(values)
    assert len({axis.name(tick) for tick in axis.ticks}) == len(axis.ticks)
    assert Frame(step_axis([1, 2]), axis).at(1, values[0]) == Frame(step_axis([1, 2]), axis).at(1, values[1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (12500, "12.5k"),
        (9999, "9999"),
        (9999.6, "10k"),
        (2e6, "2M"),
        (3e15, "3e15"),
        (0.03, "0.03"),
        (2e-5, "2e-5"),
        (1.25e-5, "1.25e-5"),
        (-2.5e-4, "-2.5e-4"),
    ],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected
    assert percent(0.4567) == "45.7%"


@given(POINTS, st.integers(4, 60))
def test_thinned_points_keep_the_ends_and_every_peak(points: list[tuple[float, float]], most: int) -> None:
    kept = thinned(points, most)
    assert len(kept) <= max(most, 4)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(set(kept)) and set(kept) <= set(points)
    values, kept_values = [value for _, value in points], [value for _, value in kept]
    assert min(values) == min(kept_values) and max(values) == max(kept_values)
    assert kept == points or len(points) > most


def coordinates(svg: str) -> list[tuple[float, float]]:
    """Of all that is drawn in colour."""
    drawn = [each.get("d", "") for each in ElementTree.fromstring(svg).iter() if "c0" in each.get("class", "").split()]
    return [(float(x), float(y)) for d in drawn for x, y in re.findall(r"([\d.]+) ([\d.]+)", d)]


@given(POINTS)
def test_charts_are_well_formed_and_stay_within_their_frame(points: list[tuple[float, float]]) -> None:
    axes = step_axis([x for x, _ in points]), value_axis([y for _, y in points])
    band = [(x, y - abs(y), y + abs(y)) for x, y in points]
    for svg in (
        line_chart([Curve("a", points, band=band)], "label", *axes),
        stack_chart([Curve("a", points), Curve("b", points, 1)], "label", *axes),
        histogram_chart([Curve("a", points)], "label", *axes),
    ):
        for x, y in coordinates(svg):
            assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


def test_a_point_lies_where_its_numbers_say() -> None:
    frame = Frame(step_axis([0, 100]), linear_axis([0, 10]))
    (left, bottom), (right, top) = frame.at(0, 0), frame.at(100, 10)
    middle = frame.at(50, 5)
    assert float(middle[0]) == pytest.approx((float(left) + float(right)) / 2, abs=0.1)
    assert float(middle[1]) == pytest.approx((float(bottom) + float(top)) / 2, abs=0.1)
    log = Axis(1, 100, [1, 10, 100], short, log=True)
    assert [log.share(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])


def test_stacked_areas_lie_upon_each_other() -> None:
    layers = [Curve("a", [(1, 0.25), (2, 0.5)], 0), Curve("b", [(1, 0.75), (2, 0.5)], 1)]
    paths = re.findall(
        r'class="stack c\d" d="([^"]+)"', stack_chart(layers, "", step_axis([1, 2]), linear_axis([0, 1]))
    )
    first, second = ([tuple(pair.split()) for pair in re.split("[MLZ]", path) if pair] for path in paths)
    assert first[:2] == list(reversed(second[2:])), "the first one's top is the second one's bottom"


def test_few_points_are_dots_and_many_are_not() -> None:
    axes = step_axis([0, 99]), linear_axis([0, 99])
    assert line_chart([Curve("a", [(5, 5)])], "", *axes).count("<circle") == 1
    assert line_chart([Curve("a", [(5, 5)])], "", *axes).count('class="line') == 0
    assert line_chart([Curve("a", [(i, i) for i in range(99)])], "", *axes).count("<circle") == 0


def test_the_label_is_escaped() -> None:
    svg = line_chart([Curve("a", [(1, 1)])], '"><script>', step_axis([1]), linear_axis([1]))
    assert ElementTree.fromstring(svg).get("aria-label") == '"><script>'
