"""What is told of runs in words and tables: facts, what was left out, keys that differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from statistics import median
from typing import Any

from llava_train.data.problems import KINDS
from llava_train.report.figures import points_of
from llava_train.report.quantities import mean_loss
from llava_train.report.read import Line, RunRecord, list_of, number, table_of, text_of
from llava_train.report.svg import percent, short
from llava_train.report.times import time_spent
from llava_train.run_files import flatten

_N_EXAMPLES, _MOST_BAD_STEPS, _MOST_CHARACTERS = 3, 20, 300


def state_of(record: RunRecord, ended: bool) -> str:
    """Where a run stands; `ended` where it is known not to go on by itself."""
    if record.complete:
        return "complete"
    where = f"step {record.step:,}" + (f" of {record.n_steps:,}" if record.n_steps else "")
    return f"stopped after {where}" if ended else where


def facts(record: RunRecord) -> dict[str, str]:
    """A run in a few numbers, by name; what is not known is left out."""
    last = record.training[-1] if record.training else {}
    losses = [value for _, value in points_of(record.evaluations, "eval_loss")]
    seconds = sum(part.seconds for part in time_spent(record))
    typical = {key: _typical(record, key) for key in ("tokens_per_s", "samples_per_s", "mfu")}
    memory = [value for _, value in points_of(record.training, "peak_memory_bytes", unit=1 << 30)]
    loss, skipped, left_out = mean_loss(last), number(last.get("skipped_steps")), number(last.get("n_bad"))
    found = {
        "Steps": f"{record.step:,}" + (f" of {record.n_steps:,}" if record.n_steps else ""),
        "Time": duration(seconds) if seconds else None,
        "Last logged": _date(last),
        "Training loss": f"{loss:.3f}" if loss is not None else None,
        "Held-out loss": _from_to(losses, "{:.3f}") if losses else None,
        **_scores(record),
        "Tokens a second": short(round(typical["tokens_per_s"])) if typical["tokens_per_s"] else None,
        "Samples a second": f"{typical['samples_per_s']:.3g}" if typical["samples_per_s"] else None,
        "MFU": percent(typical["mfu"]) if typical["mfu"] else None,
        "Peak memory": f"{max(memory):.1f} GiB" if memory else None,
        "Samples left out": f"{left_out:,.0f}" if left_out is not None else None,
        "Steps skipped": f"{skipped:,.0f}" if skipped else None,
        "Ranks": str(record.about["n_ranks"]) if "n_ranks" in record.about else None,
    }
    return {name: value for name, value in found.items() if value}


def _typical(record: RunRecord, key: str) -> float | None:
    """The median, without the first line, which holds what happens once."""
    values = [value for _, value in points_of(record.training, key)]
    return median(values[1:] or values) if values else None


def _from_to(values: Sequence[float], form: str) -> str:
    ends = [values[0], values[-1]] if len(values) > 1 else values
    return " → ".join(form.format(value) for value in ends)


def _scores(record: RunRecord) -> dict[str, str]:
    """The score that the stage file names, before and after."""
    metric = table_of(record.config.get("eval")).get("metric")
    values = [value for _, value in points_of(record.evaluations, f"eval_{metric}")] if metric else []
    return {f"Score ({metric})": _from_to(values, "{:.3f}")} if values else {}


def _date(line: Line) -> str | None:
    with suppress(OverflowError, OSError, ValueError):
        if when := number(line.get("time")):
            return datetime.fromtimestamp(when, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return None


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s`, `4.2 s`, `5.8 ms`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def left_out(record: RunRecord) -> list[dict[str, Any]]:
    """Samples that were not trained on, by kind, the most frequent first, with a few examples."""
    by_kind = Counter(str(line.get("kind")) for line in record.quarantine)
    return [
        {
            "kind": KINDS.get(kind, kind),
            "count": count,
            "examples": [
                {key: text_of(line.get(key), _MOST_CHARACTERS) for key in ("source", "id", "line", "reason")}
                for line in [line for line in record.quarantine if str(line.get("kind")) == kind][:_N_EXAMPLES]
            ],
        }
        for kind, count in by_kind.most_common()
    ]


def bad_steps(record: RunRecord) -> tuple[list[dict[str, Any]], int]:
    """Steps that were not taken, with their samples in a line, and how many more there are."""
    shown = [
        {
            "step": int(line["step"]),
            "loss": _or_not_finite(line.get("loss")),
            "grad_norm": _or_not_finite(line.get("grad_norm")),
            "samples": ", ".join(str(table_of(sample).get("id")) for sample in list_of(line.get("samples"))),
        }
        for line in record.bad_steps[:_MOST_BAD_STEPS]
    ]
    return shown, len(record.bad_steps) - len(shown)


def _or_not_finite(value: Any) -> str:
    known = number(value)
    return "not finite" if known is None else f"{known:.4g}"


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Keys of config.yaml that are not alike, each with its value in every run; where files were is left out."""
    abouts = [{key: value for key, value in record.about.items() if key != "places"} for record in records]
    flat = [dict(flatten({**each.config, "about": about})) for each, about in zip(records, abouts, strict=True)]
    keys = list({key: None for each in flat for key in each})
    values = {key: [_shown(each.get(key, "not set")) for each in flat] for key in keys}
    different = [(key, shown) for key, shown in values.items() if len(set(shown)) > 1]
    return [(key, [text_of(each, _MOST_CHARACTERS) for each in shown]) for key, shown in different]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
