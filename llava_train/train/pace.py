"""How long a run takes: by its FLOPs where the peak of the devices is known, and measured after a few steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llava_train.data.chat import IGNORED
from llava_train.data.loader import StepDataset
from llava_train.data.problems import SampleError
from llava_train.train.metrics import Yardstick

ASSUMED_MFU = 0.4
"""Share of a GPU's peak that a run is assumed to use, where nothing else is said."""
N_MEASURED = 5
"""Steps after the first line of a start, which holds what happens once, that a pace is measured over."""
_N_LOOKED_AT = 64


def expected_step_s(dataset: StepDataset, yardstick: Yardstick) -> float | None:
    """Seconds of a step by the FLOPs of a few samples over the whole of the data; None where those are not known."""
    if yardstick.flops is None or yardstick.peak_flops is None:
        return None
    mixture, flops = dataset.mixture, []
    for number in range(0, len(mixture), max(1, len(mixture) // _N_LOOKED_AT)):
        try:
            tokens = dataset.encoder.encode(mixture[number])
        except SampleError:
            continue
        n_supervised = int((tokens.labels != IGNORED).sum())
        flops.append(yardstick.flops.of_pack((tokens.n_tokens,), tokens.n_images, n_supervised).total)
    of_step = sum(flops) / max(len(flops), 1) * dataset.batch_size
    return of_step / (dataset.n_ranks * yardstick.peak_flops * ASSUMED_MFU) or None


class Pace:
    """What the logged lines of a start say of the time that a step takes."""

    def __init__(self) -> None:
        self.step_s: float | None = None
        """In the last line but the first."""
        self._first_step = self._last_step = 0
        self._took_s = 0.0
        """The steps between them."""
        self._told = False

    def measured(self, step: int, metrics: Mapping[str, Any]) -> str | None:
        """Takes a logged line; returns what is to be said of it, once."""
        if not self._first_step:
            self._first_step = self._last_step = step
            return None
        self.step_s, n_steps = metrics["step_s"], step - self._first_step
        self._took_s += metrics["step_s"] * (step - self._last_step)
        self._last_step = step
        if self._told or n_steps < N_MEASURED or not metrics["time_left_s"]:
            return None
        self._told = True
        n_left = metrics["time_left_s"] / metrics["step_s"]
        return f"measured over {n_steps} steps: the rest takes about {about(n_left * self._took_s / n_steps)}"


def figure(value: float) -> str:
    """A number to three digits, without an exponent: `2,250`, `989`, `66.9`, `0.1`, `0.00125`."""
    n_decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:,.{max(0, n_decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def about(seconds: float) -> str:
    """A time for people: `a second`, `40 s`, `12 min`, `9.5 h`, `3.2 days`."""
    if seconds < 1:
        return "a second"
    for below_s, unit_s, words in ((90, 1, "{:.0f} s"), (5400, 60, "{:.0f} min"), (172800, 3600, "{:.1f} h")):
        if seconds < below_s:
            return words.format(seconds / unit_s)
    return f"{seconds / 86400:.1f} days"
