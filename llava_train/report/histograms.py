"""How long the samples of a run were, and how full its packs."""

from __future__ import annotations

from collections.abc import Sequence

from llava_train.report.figures import N_COLOURS, Figure, Key
from llava_train.report.read import RunRecord, number, table_of
from llava_train.report.svg import Curve, Name, Point, close_axis, histogram_chart, linear_axis, percent, short


def histogram_figures(records: Sequence[RunRecord]) -> list[Figure]:
    """How long samples were, and how full packs."""
    of_lengths = [_bins(record, "sample_lengths", _max_sample_tokens(record)) for record in records]
    of_packs = [_bins(record, "pack_fill", 1.0) for record in records]
    found = [
        _histogram(records, of_lengths, "Tokens a sample", "Image tokens too; share of the samples.", "tokens", short),
        _histogram(records, of_packs, "How full packs were", "Of batch.max_tokens; share of the packs.", "", percent),
    ]
    return [figure for figure in found if figure]


def _max_sample_tokens(record: RunRecord) -> float:
    return number(table_of(record.config.get("batch")).get("max_sample_tokens")) or 0.0


def _bins(record: RunRecord, key: str, whole: float) -> list[Point]:
    """(right edge, share of all) of each bin, summed over the lines."""
    totals: list[float] = []
    for line in record.training:
        counts = line.get(key)
        if isinstance(counts, list) and len(counts) == (len(totals) or len(counts)):
            added = [number(count) or 0.0 for count in counts]
            totals = [total + count for total, count in zip(totals or [0.0] * len(added), added, strict=True)]
    n_all = sum(totals)
    if not n_all or not whole:
        return []
    return [((i + 1) * whole / len(totals), count / n_all) for i, count in enumerate(totals)]


def _histogram(
    records: Sequence[RunRecord],
    of_runs: Sequence[Sequence[Point]],
    title: str,
    about: str,
    unit: str,
    name: Name,
) -> Figure | None:
    """Down to the last bin that is not empty in every run; None where all are."""
    used = max((n + 1 for points in of_runs for n, (_, share) in enumerate(points) if share), default=0)
    alone = len(records) == 1
    curves = [
        Curve("share" if alone else record.name, points[:used], colour=number_of_run % N_COLOURS)
        for number_of_run, (record, points) in enumerate(zip(records, of_runs, strict=True))
        if points
    ]
    if not curves:
        return None
    rights = [right for curve in curves for right, _ in curve.points]
    heights = [share for curve in curves for _, share in curve.points]
    x = close_axis([0.0, max(rights)], unit, name)
    fullest = max(curves[0].points, key=lambda point: point[1])
    label = f"{title}: a histogram, most ({percent(fullest[1])}) up to {name(fullest[0])}"
    svg = histogram_chart(curves, label, x, linear_axis(heights, from_zero=True, name=percent))
    rows = [
        [name(right), *(percent(dict(curve.points)[right]) if right in dict(curve.points) else "" for curve in curves)]
        for right in sorted(set(rights))
    ]
    keys = [] if alone else [Key(curve.name, f"fill c{curve.colour}") for curve in curves]
    return Figure(title, svg, about, keys, ["up to", *(curve.name for curve in curves)], rows)
