from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_train.train.interrupt import StopRequests
from tests.train.helpers import environment


def soon(requests: StopRequests, is_main: bool = True) -> str | None:
    """What a rank is told within two seconds."""
    deadline = time.monotonic() + 2
    while requests.reason(is_main) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return requests.reason(is_main)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_of_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.reason(is_main=True) is None
        os.kill(os.getpid(), number)
        assert soon(requests) == number.name
    assert signal.getsignal(number) == before


def test_ctrl_c_is_not_taken_for_a_request() -> None:
    with StopRequests() as requests, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert requests.reason(is_main=True) is None


def test_a_stop_file_is_seen_by_rank_0_and_deleted_when_the_run_has_saved(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    with StopRequests(files) as requests:
        files[1].touch()
        assert soon(requests, is_main=False) is None
        assert soon(requests, is_main=True) == str(files[1])
        requests.done(is_main=True)
    assert not files[1].exists()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # a process that has saved ignores them; this one goes on


WAITS_IN_C = """
import ctypes, sys
from llava_train.train.interrupt import StopRequests
libc = ctypes.CDLL(None)
with StopRequests() as requests:
    print("ready", flush=True)
    for _ in range(int(sys.argv[1])):
        libc.sleep(1)  # as a collective: Python does not come by; a signal ends it early
    print(requests.reason(True))
"""


def signalled(times: list[float]) -> tuple[int, str]:
    """Exit code and last line of a process that waits in C, with SIGTERM after each of these pauses."""
    command = [sys.executable, "-c", WAITS_IN_C, "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for pause in times:
            time.sleep(pause)
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=20), process.stdout.read().strip()


def test_one_signal_or_its_echo_lets_the_process_go_on() -> None:
    assert signalled([0.2]) == (0, "SIGTERM")
    assert signalled([0.2, 0.1]) == (0, "SIGTERM")


def test_a_second_signal_ends_the_process_at_once_also_when_it_hangs() -> None:
    assert signalled([0.2, 1.5]) == (128 + signal.SIGTERM, "")
