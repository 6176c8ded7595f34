"""Requests to stop: a signal to any one rank, or a stop file. The ranks agree on them at a step border (loop).

The first SIGTERM or SIGUSR1 only leaves a note; the second ends the process at once, for whoever sends it does not
want to wait. Once the run has saved and ends, signals are ignored: launchers send them to the ranks that are left when
the first has ended.

Python calls a signal's handler when the main thread comes back from a collective, which may be never. So a thread
listens for signals: Python's handler in C tells it at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

EXIT_RESUBMIT = 85
"""Exit code of a run that was asked to stop, has saved, and goes on by the same command."""

STOP_FILE = "stop"
"""`touch runs/NAME/stop` stops a run; the run deletes the file."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST_S = 1.0
"""Launchers and shells may hand on one signal twice."""
_LOOK_EVERY_S = 0.5


class Preempted(Exception):
    """The run was asked to stop and has saved what it could. Every rank raises it."""


class StopRequests:
    """Notes requests to stop while it is entered, in the main thread.

    Args:
        stop_files: each asks to stop when it exists. Rank 0 alone looks.
    """

    def __init__(self, stop_files: Sequence[Path] = ()) -> None:
        self.stop_files = list(stop_files)
        self._ending = False
        self._signal: int | None = None
        self._noted = self._looked = float("-inf")
        self._found: Path | None = None

    def __enter__(self) -> StopRequests:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._told_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._handled_before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handled_before.items():
            signal.signal(number, signal.SIG_IGN if self._ending else handler)
        signal.set_wakeup_fd(self._told_before)
        self._mouth.close()

    def reason(self, is_main: bool) -> str | None:
        """Who asked this rank to stop, in words."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if is_main and self._found is None and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._found = next((path for path in self.stop_files if path.exists()), None)
            self._looked = time.monotonic()
        return str(self._found) if self._found else None

    def done(self, is_main: bool) -> None:
        """The run has saved: further signals change nothing, and the stop files have done their work."""
        self._ending = True
        for path in self.stop_files if is_main else ():
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _listen(self) -> None:
        with self._ears:
            while told := self._ears.recv(1):
                if told[0] in SIGNALS:
                    self._note(told[0])

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._noted = number, now
        elif not self._ending and now - self._noted > _SAME_REQUEST_S:
            os._exit(128 + number)
