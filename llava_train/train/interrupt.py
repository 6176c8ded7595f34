"""Requests to stop: a signal to any one rank, or a stop file. The ranks agree on them at a step border (loop).

The first SIGTERM or SIGUSR1 only leaves a note; the second ends the process at once, for whoever sends it does not
want to wait. Once the run has saved and ends, signals are ignored: launchers send them to the ranks that are left when
the first has ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

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
        self.ending = False
        self._signal: int | None = None
        self._noted = self._looked = float("-inf")
        self._found: Path | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.ending else handler)  # type: ignore[arg-type]

    def reason(self, is_main: bool) -> str | None:
        """Who asked this rank to stop, in words."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if is_main and self._found is None and time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._found = next((path for path in self.stop_files if path.exists()), None)
            self._looked = time.monotonic()
        return str(self._found) if self._found else None

    def done(self) -> None:
        """The run has saved: further signals change nothing, and the stop file has done its work."""
        self.ending = True
        if self._found:
            self._found.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is not None and not self.ending and now - self._noted > _SAME_REQUEST_S:
            os._exit(128 + number)
        if self._signal is None:
            self._signal, self._noted = number, now
