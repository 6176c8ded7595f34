"""Where the time of a run went."""

from __future__ import annotations

from dataclasses import dataclass

from llava_train.report.figures import N_COLOURS, Figure, Key, table
from llava_train.report.read import Line, RunRecord, number
from llava_train.report.svg import Curve, linear_axis, percent, stack_chart, step_axis

PARTS_OF_TIME = {
    "data_wait_share": "waiting for data",
    "copy_share": "copies to the device",
    "forward_share": "forward",
    "backward_share": "backward",
    "optimizer_share": "gradients and optimizer",
}
"""Keys of metrics.jsonl, and what they are called."""


def shares(line: Line) -> dict[str, float]:
    """What each part takes of a step's time, `the rest` among them; empty where nothing was measured."""
    known = {name: share for key, name in PARTS_OF_TIME.items() if (share := number(line.get(key))) is not None}
    return {**known, "the rest": max(0.0, 1.0 - sum(known.values()))} if known else {}


def shares_figure(record: RunRecord) -> Figure | None:
    """The parts of a step's time, upon each other."""
    lines = [(float(line["step"]), shares(line)) for line in record.training]
    lines = [(step, found) for step, found in lines if found]
    names = [name for name in (*PARTS_OF_TIME.values(), "the rest") if any(name in found for _, found in lines)]
    if len(lines) < 2:
        return None
    layers = [
        Curve(name, [(step, found.get(name, 0.0)) for step, found in lines], colour=colour_of_part(name))
        for name in names
    ]
    keys = [Key(layer.name, f"fill c{layer.colour}", percent(layer.points[-1][1])) for layer in layers]
    label = f"Where the time of a step goes: {', '.join(f'{key.name} {key.value}' for key in keys)} in the end"
    highest = max(1.0, *(sum(found.values()) for _, found in lines))
    svg = stack_chart(layers, label, step_axis([step for step, _ in lines]), linear_axis([0.0, highest], name=percent))
    header, rows = table(layers, "step", percent)
    return Figure("Where the time of a step goes", svg, "Shares of each part, mean over ranks.", keys, header, rows)


def colour_of_part(name: str) -> int:
    """Of a part of the time, everywhere the same."""
    parts = [*PARTS_OF_TIME.values(), "evaluations", "checkpoints"]
    return parts.index(name) if name in parts else N_COLOURS - 1


@dataclass(frozen=True)
class Spent:
    """What a part of a run took, over all of it."""

    name: str
    seconds: float
    colour: int


def time_spent(record: RunRecord) -> list[Spent]:
    """On each part of the run's steps, on evaluations and on checkpoints; what was not timed is `steps`."""
    totals: dict[str, float] = {}
    before = 0
    for line in record.training:
        seconds = (line["step"] - before) * (number(line.get("step_s")) or 0.0)
        before = line["step"]
        for name, share in (shares(line) or {"steps": 1.0}).items():
            totals[name] = totals.get(name, 0.0) + share * seconds
        for key, name in {"evaluation_s": "evaluations", "checkpoint_s": "checkpoints"}.items():
            totals[name] = totals.get(name, 0.0) + (number(line.get(key)) or 0.0)
    last = ("the rest", "steps")
    names = sorted((name for name, seconds in totals.items() if seconds > 0), key=lambda name: name in last)
    return [Spent(name, totals[name], colour_of_part(name)) for name in names]
