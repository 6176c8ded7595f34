from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.train import stopwatch
from llava_train.train.engine import time_reduction
from llava_train.train.stopwatch import Stopwatch
from tests.train.helpers import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


def test_spans_of_a_name_add_up_until_they_are_read(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(3):
        with watch("copy"):
            clock.sleep(2.0)
        with watch("optimizer"):
            clock.sleep(1.0)
    clock.sleep(10.0)
    assert watch.read() == {"copy": 6.0, "optimizer": 3.0}
    assert watch.read() == {}


def test_what_fails_is_not_timed_and_its_error_is_its_own() -> None:
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("copy"):
        _ = 1 / 0
    assert watch.read() == {}


def test_the_sum_of_the_gradients_is_timed(clock: Clock) -> None:
    def allreduce_gradients(bucket_size: int = 1) -> int:
        clock.sleep(3.0)
        return bucket_size

    engine: Any = SimpleNamespace(allreduce_gradients=allreduce_gradients)
    watch = Stopwatch()
    time_reduction(engine, watch)
    assert engine.allreduce_gradients(bucket_size=7) == 7
    assert watch.read() == {"reduction": 3.0}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_time_is_taken_without_waiting_for_it() -> None:
    watch, n_cycles = Stopwatch(torch.device("cuda")), 100_000_000
    before, began, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        before.record()
        torch.cuda._sleep(2 * n_cycles)  # queued before: not part of the span
        began.record()
        with watch("copy"):
            torch.cuda._sleep(n_cycles)
        done.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    span_s, all_s = began.elapsed_time(done) / 1000, before.elapsed_time(done) / 1000
    assert 0 < watch.read()["copy"] <= span_s < all_s, "the device's clock, and of the span alone"
