"""What of a run is drawn over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_train.report.figures import Figure, Quantity, averaged, points_of
from llava_train.report.read import Line, RunRecord, number, table_of
from llava_train.report.svg import Curve, percent

_GIB = 1 << 30


def mean_loss(line: Line) -> float | None:
    """Of the steps since the line before, over their supervised tokens; of the last step where no source tells."""
    sources = [table_of(source) for source in table_of(line.get("sources")).values()]
    pairs = [(number(source.get("loss")), number(source.get("n_supervised"))) for source in sources]
    known = [(loss, n) for loss, n in pairs if loss is not None and n]
    n_supervised = sum(n for _, n in known)
    return sum(loss * n for loss, n in known) / n_supervised if n_supervised else number(line.get("loss"))


def _loss(record: RunRecord) -> list[Curve]:
    means = [(float(line["step"]), mean_loss(line)) for line in record.training]
    return [
        Curve("training", averaged([(step, loss) for step, loss in means if loss is not None])),
        Curve("held out", points_of(record.evaluations, "eval_loss"), dash=1),
    ]


def _loss_of_one(record: RunRecord) -> list[Curve]:
    means, held_out = _loss(record)
    single = points_of(record.training, "loss")
    return [means, held_out, Curve("single steps", single if single != means.points else [], faint=True)]


def _of_sources(record: RunRecord) -> list[Curve]:
    names = _names_in(record, "sources")
    each = [Curve(name, averaged(points_of(record.training, "sources", name, "loss"))) for name in names]
    return each if len(each) > 1 else []


def _names_in(record: RunRecord, key: str) -> list[str]:
    """Those in the object `key` of any line."""
    return list({name: None for line in record.training for name in table_of(line.get(key))})


def _rates(record: RunRecord) -> list[Curve]:
    return [Curve(name, points_of(record.training, "lr", name)) for name in _names_in(record, "lr")]


def _grad_norms(record: RunRecord) -> list[Curve]:
    names = _names_in(record, "grad_norms")
    parts = [Curve(name, points_of(record.training, "grad_norms", name)) for name in names]
    return [Curve("all parts", points_of(record.training, "grad_norm")), *(parts if len(parts) > 1 else ())]


def _scores(record: RunRecord) -> list[Curve]:
    names = list({key: None for line in record.evaluations for key in line if key.startswith("eval_")})
    known = [n for n in names if n not in ("eval_loss", "eval_n_bad") and not n.endswith(("_low", "_high"))]
    return [Curve(n.removeprefix("eval_"), points_of(record.evaluations, n), band=_band(record, n)) for n in known]


def _band(record: RunRecord, name: str) -> list[tuple[float, float, float]]:
    lows, highs = (dict(points_of(record.evaluations, f"{name}_{end}")) for end in ("low", "high"))
    return [(step, low, highs[step]) for step, low in lows.items() if step in highs]


def _plain(unit: float = 1.0, **keys: str) -> Callable[[RunRecord], list[Curve]]:
    return lambda record: [Curve(name, points_of(record.training, key, unit=unit)) for key, name in keys.items()]


LEARNING = (
    Quantity(
        "Loss",
        "Cross entropy of the answers' tokens. Training: the mean since the point before.",
        _loss,
        of_one_run=_loss_of_one,
    ),
    Quantity(
        "Loss by source",
        "Mean since the point before, for each source of the data.",
        _of_sources,
    ),
    Quantity("Scores of answers", "Of generated answers to held-out questions, with 95% intervals.", _scores),
    Quantity("Learning rate", "Of each part that trains.", _rates),
    Quantity("Gradient norm", "Of the last step, before clipping.", _grad_norms),
)
SPEED = (
    Quantity(
        "Tokens a second", "Over all devices.", _plain(tokens_per_s="all tokens", text_tokens_per_s="text alone"), True
    ),
    Quantity("Samples a second", "Over all devices.", _plain(samples_per_s="samples", images_per_s="pictures"), True),
    Quantity("Model FLOPs utilization", "Share of the device's datasheet peak.", _plain(mfu="MFU"), True, percent),
    Quantity(
        "Peak memory",
        "GiB, of the rank with most: on a GPU of tensors, on a CPU of the process.",
        _plain(_GIB, peak_memory_bytes="GiB"),
        True,
    ),
)


def figures(quantities: Sequence[Quantity], records: Sequence[RunRecord]) -> list[Figure]:
    """Those of which the runs have numbers."""
    return [figure for quantity in quantities if (figure := quantity.figure(records))]
