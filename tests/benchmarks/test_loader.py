from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scripts import load_script

loader = load_script("benchmarks/loader.py")


@pytest.mark.parametrize("workers", [0, 1, 8])
def test_what_workers_had_ready_does_not_count(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def read_steps(_: Any, steps: range, n_workers: int, pin_memory: bool) -> Iterator[Any]:
        """A second a batch, of which each worker has two ready and a third begun; the last of a worker are free."""
        nonlocal now
        for step in steps:
            is_ready = step < 3 * n_workers or step >= len(steps) - n_workers
            now += 0.0 if is_ready else 1.0
            yield SimpleNamespace(n_samples=(30, 2))

    monkeypatch.setattr(loader, "read_steps", read_steps)
    monkeypatch.setattr(loader, "dataset_of", lambda *_: None)
    monkeypatch.setattr(loader.time, "perf_counter", lambda: now)
    assert loader.throughput(None, None, workers) == 32.0
