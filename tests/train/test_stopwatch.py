from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.train.engine import time_reduction
from llava_train.train.stopwatch import Stopwatch


def test_spans_of_a_name_add_up_until_they_are_read() -> None:
    watch = Stopwatch()
    for _ in range(3):
        with watch("copy"):
            time.sleep(0.02)
        with watch("optimizer"):
            time.sleep(0.01)
    time.sleep(0.1)
    read = watch.read()
    assert read.keys() == {"copy", "optimizer"}
    assert 0.06 <= read["copy"] < 0.15
    assert 0.03 <= read["optimizer"] < 0.1
    assert watch.read() == {}


def test_what_fails_is_not_timed_and_its_error_is_its_own() -> None:
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("copy"):
        _ = 1 / 0
    assert watch.read() == {}


def test_the_sum_of_the_gradients_is_timed() -> None:
    def allreduce_gradients(bucket_size: int = 1) -> int:
        time.sleep(0.03)
        return bucket_size

    engine: Any = SimpleNamespace(allreduce_gradients=allreduce_gradients)
    watch = Stopwatch()
    time_reduction(engine, watch)
    assert engine.allreduce_gradients(bucket_size=7) == 7
    assert watch.read()["reduction"] >= 0.03


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_time_is_taken_without_waiting_for_it() -> None:
    watch, n_cycles = Stopwatch(torch.device("cuda")), 100_000_000
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2 * n_cycles)  # queued before: not part of the span
        with watch("copy"):
            torch.cuda._sleep(n_cycles)
        queued_s = time.perf_counter() - started
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    all_s = time.perf_counter() - started
    assert queued_s < all_s / 2
    assert watch.read()["copy"] == pytest.approx(all_s / 3, rel=0.2)
