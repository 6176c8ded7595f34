from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_train.train.interrupt import StopRequests
from tests.train.helpers import TIMEOUT_S, environment


def soon(requests: StopRequests) -> str:
    """What rank 0 is told, when it is."""
    while (reason := requests.reason(is_main=True)) is None:
        time.sleep(0.01)
    return reason


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
        time.sleep(TIMEOUT_S)
    assert requests.reason(is_main=True) is None


def test_a_stop_file_is_seen_by_rank_0_and_deleted_when_the_run_has_saved(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    with StopRequests(files) as requests:
        files[1].touch()
        assert requests.reason(is_main=False) is None
        assert soon(requests) == str(files[1])
        requests.done(is_main=True)
    assert not files[1].exists()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # a process that has saved ignores them; this one goes on


WAITS_IN_C = """
import ctypes, signal, sys, threading
from llava_train.train import interrupt
interrupt._SAME_REQUEST_S = float(sys.argv[1])
libc = ctypes.CDLL(None)
with interrupt.StopRequests() as requests:
    noted, end = requests._note, threading.Event()
    def note(number):
        noted(number)
        print(signal.Signals(number).name, flush=True)
    requests._note = note
    print("ready", flush=True)
    threading.Thread(target=lambda: sys.stdin.read() or end.set(), daemon=True).start()
    while not end.is_set():
        libc.usleep(100_000)  # as a collective: Python does not come by; a signal ends it early
    print("goes on after", requests.reason(True))
"""


def signalled(n_signals: int, same_request_s: float) -> tuple[int, list[str]]:
    """Exit code and words of a process that waits in C and gets SIGTERM, each when the one before has been noted.

    Args:
        same_request_s: how long after the first a signal counts as its echo.
    """
    command = [sys.executable, "-c", WAITS_IN_C, str(same_request_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment()) as process:
        assert process.stdin and process.stdout
        said = [process.stdout.readline()]
        for _ in range(n_signals):
            process.send_signal(signal.SIGTERM)
            said.append(process.stdout.readline())
        rest, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, [*"".join(said).split("\n")[:-1], *rest.split("\n")[:-1]]


@pytest.mark.parametrize("n_signals", [1, 2])
def test_one_signal_or_its_echo_lets_the_process_go_on(n_signals: int) -> None:
    said = ["ready", *["SIGTERM"] * n_signals, "goes on after SIGTERM"]
    assert signalled(n_signals, same_request_s=9999) == (0, said)


def test_a_second_signal_ends_the_process_at_once_also_when_it_hangs() -> None:
    assert signalled(2, same_request_s=0) == (128 + signal.SIGTERM, ["ready", "SIGTERM"])
