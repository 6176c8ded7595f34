"""The line of a logged step: whole in a log, and as much of it as fits a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_train.train.memory import gib

_DROPPED_FIRST = ("memory", "data", "mfu", "lr", "speed", "left", "loss")
_GAP = "  "


def fields(metrics: Mapping[str, Any], step: int, n_steps: int, step_s: float | None) -> dict[str, str]:
    """What is shown of a line of metrics.jsonl (docs/metrics.md), in its order; what is not known is left out.

    Args:
        metrics: the last line; empty before the first.
        step: steps done by now.
        step_s: seconds that a step takes; None where it is not known yet.
    """
    shown = {"step": f"step {step:>{len(str(n_steps))}}/{n_steps}"}
    if metrics:
        shown |= {
            "loss": f"loss {metrics['loss']:.4f}",
            "lr": f"lr {max(metrics['lr'].values()):.2e}",
            "speed": f"{metrics['tokens_per_s']:>7,.0f} tokens/s",
            "mfu": "" if metrics["mfu"] is None else f"MFU {metrics['mfu']:5.1%}",
            "data": f"data wait {metrics['data_wait_share']:5.1%}",
            "memory": gib(metrics["peak_memory_bytes"]),
            "left": "" if step_s is None else f"{clock((n_steps - step) * step_s)} left",
        }
    return {name: text for name, text in shown.items() if text}


def joined(shown: Mapping[str, str]) -> str:
    """Fields as one line."""
    return _GAP.join(shown.values())


def fitted(shown: Mapping[str, str], width: int) -> dict[str, str]:
    """The fields that a line of `width` has room for: the least important are left out first, the step never is.

    {"step": "step 5/90", "loss": "loss 5.7768", "memory": "1.2 GiB"}, 30 -> step and loss
    """
    left = dict(shown)
    for name in _DROPPED_FIRST:
        if len(joined(left)) <= width:
            break
        left.pop(name, None)
    return left


def clock(seconds: float) -> str:
    """`1:02:05`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
