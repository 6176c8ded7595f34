"""Seconds that parts of a step take.

On a GPU the clock is the device's: an event is recorded before and after, and read when a line is logged, so that no
step waits for the device. Elsewhere it is the CPU's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

Mark = Any
"""A moment: seconds on a CPU, a recorded event on a GPU."""


class Stopwatch:
    """Adds up, by name, how long parts of the code take.

    >>> watch = Stopwatch()
    >>> with watch("copy"):
    ...     batch = batch.to(device)
    >>> watch.read()
    {"copy": 0.004}
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._spans: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._spans[name].append((start, self._mark()))

    def timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return function(*arguments, **options)

        return timed

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading. Waits for the device."""
        spans, self._spans = self._spans, defaultdict(list)
        return {name: sum(self._seconds(*span) for span in of_name) for name, of_name in spans.items()}

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Mark, end: Mark) -> float:
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
