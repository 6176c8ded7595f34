"""Where the time before the first step goes."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest

from llava_train.train import session
from llava_train.train.session import StartClock, age_s


def now_s() -> float:
    """Seconds since the machine started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def send_age(pipe: Any) -> None:
    """Sends the age of this process, between the times before and after it is read."""
    pipe.send((now_s(), age_s(), now_s()))


def test_a_process_is_as_old_as_the_time_since_its_start() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=send_age, args=(theirs,))
    before = now_s()
    process.start()
    after = now_s()
    read_after, age, read_before = ours.recv()
    process.join()
    tick_s = 0.02
    assert before - tick_s <= read_before - age, "it counts from before the start"
    assert read_after - age <= after + tick_s, "it counts from after the start"


def test_the_parts_of_a_start_follow_each_other_and_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.5, 104.0, 200.0, 203.0])
    monkeypatch.setattr(session, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(times))}))
    monkeypatch.setattr(session, "age_s", lambda: 5.0)
    clock = StartClock()
    clock.start()
    clock.mark("imports")
    clock.mark("model")
    assert clock.line() == "first step after 9.0 s: imports 6.5, model 2.5"
    clock.mark("step 2")
    assert clock.line() is None
    clock.start()
    clock.mark("data")
    assert clock.line() == "first step after 3.0 s: data 3.0"
