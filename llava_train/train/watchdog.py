"""Ends a job when a rank hangs or has died, and names that rank.

The others then hang in a collective (NCCL or gloo), which nothing interrupts and whose own time-out, if it comes,
names nobody. So a thread stands beside the main thread of every rank, with a line of its own to rank 0:

- The main thread says what it begins (`beat`) at places that all ranks pass in the same order, and that it goes
  on (`touch`) where it works alone for long. Both only set a field.
- At every interval the thread sends a report to rank 0 (one short connection) and gets rank 0's own back.
- Rank 0 keeps the last report of each. When no rank goes on any longer (`llava_train.train.hang`) it says so and
  answers every report with the verdict. A rank that is to blame and can still answer writes the stacks of its
  threads; then all end with `EXIT_HUNG`.
- When rank 0 itself doesn't answer, each rank that hangs too ends on its own.

All times are those that the process lived through: a job that was suspended as a whole (SIGSTOP, a scheduler) goes
on where it was. A lost line alone never ends a rank: its main thread must have stopped as well.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from llava_train.train.hang import IO_S, Report, Times, Verdict
from llava_train.train.reports import Board, Caller, Line

EXIT_HUNG = 86
"""The exit code of every rank of a job that hung."""

_STDERR = 2
"""The descriptor, since the main thread may hang with the lock of `sys.stderr` in its hands."""


class _Progress(NamedTuple):
    counter: int
    activity: str
    patience: float


class Watchdog:
    """Guards the process of one rank while it is entered.

    Every rank must enter it, with the same `timeout_s`: how long the job may stand still. `share_port` is called
    once on each of several ranks, with the port on rank 0 and with None elsewhere, and returns rank 0's. `host`
    is an address of rank 0's machine.
    """

    def __init__(
        self, rank: int, n_ranks: int, host: str, share_port: Callable[[int | None], int], timeout_s: float
    ) -> None:
        self._rank, self._n_ranks, self._host, self._share_port = rank, n_ranks, host, share_port
        self._times = Times.of(timeout_s)
        self._place = f"pid {os.getpid()} on {socket.gethostname()}"
        self._progress = self._seen = _Progress(0, "its start", 1.0)
        self._idle_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)

    @property
    def activity(self) -> str:
        """What the main thread is in."""
        return self._progress.activity

    def beat(self, activity: str, patience: float = 1.0) -> None:
        """The main thread begins an activity, which may stand still for `patience` times the time-out.

        Every rank must call it at the same places in the same order.
        """
        self._progress = _Progress(self._progress.counter + 1, activity, patience)

    def touch(self) -> None:
        """The main thread goes on within its activity. A rank may call it alone."""
        self._progress = self._progress._replace()  # the thread looks whether it is the same object

    def __enter__(self) -> Watchdog:
        self._line: Line
        if self._rank == 0:
            board = Board(self._n_ranks, self._times)
            self._line = board
            if self._n_ranks > 1:
                self._share_port(board.serve(self._host))
        else:
            self._line = Caller((self._host, self._share_port(None)), self._times)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.beat(f"ending after {kind.__name__}" if kind else "leaving")
        self._stop.set()
        self._thread.join(3 * IO_S)  # a look-up of the host's name may take long, and is not worth waiting for
        self._line.close()

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            now = time.monotonic()
            leaving = self._stop.is_set()  # asked first, so that the last report says so
            verdict = self._tick(min(now - before, self._times.longest_tick_s))
            if leaving:
                return
            if verdict is not None:
                self._end(verdict)
            before = now
            self._stop.wait(self._times.interval_s)

    def _tick(self, lived_s: float) -> Verdict | None:
        progress = self._progress
        self._idle_s = self._idle_s + lived_s if progress is self._seen else 0.0
        self._seen = progress
        allowance_s = progress.patience * self._times.timeout_s
        report = Report(self._rank, self._place, progress.counter, progress.activity, self._idle_s, allowance_s)
        return self._line.exchange(report, lived_s)

    def _end(self, verdict: Verdict) -> None:
        """Says what is this rank's to say, and ends the process when every rank had time for that.

        A launcher kills all ranks when the first one ends, so that one must not end before all have heard.
        """
        moment_s = 2 * self._times.interval_s
        if verdict.message and self._rank > 1:
            # Rank 0 is gone, and with it what is known of the others. Rank 1 says it; where a launcher does not end
            # this rank thereupon, rank 1 may be gone too.
            self._stop.wait(2 * moment_s)
        # Standard error may be a pipe that nobody empties: then that is what the main thread hangs on.
        threading.Thread(target=self._speak, args=(verdict,), daemon=True).start()
        self._stop.wait(moment_s)
        os._exit(EXIT_HUNG)

    def _speak(self, verdict: Verdict) -> None:
        if verdict.message:
            os.write(_STDERR, f"{verdict.message}\n".encode())
        if self._rank in (verdict.culprits or (0,)):
            os.write(_STDERR, f"rank {self._rank} ({self._place}) is here:\n".encode())
            faulthandler.dump_traceback(_STDERR)
