"""What one command shares over its stages, and where the time before the first step goes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from llava_train.train.interrupt import StopRequests
from llava_train.train.terminal import Waiting
from llava_train.train.world import World


class StartClock:
    """Seconds of each part of a start, from the start of the process, or of a later stage, to the first step."""

    def __init__(self) -> None:
        self._parts: dict[str, float] | None = {}
        self._last = time.monotonic() - age_s()

    def start(self) -> None:
        """A stage begins."""
        if self._parts is None:
            self._parts, self._last = {}, time.monotonic()

    def mark(self, part: str) -> None:
        """What ran since the mark before was `part`."""
        if self._parts is not None:
            now = time.monotonic()
            self._parts[part] = self._parts.get(part, 0.0) + now - self._last
            self._last = now

    def line(self) -> str | None:
        """The parts in words, once a start."""
        parts, self._parts = self._parts, None
        if parts is None:
            return None
        shares = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        return f"first step after {sum(parts.values()):.1f} s: {shares}"


def age_s() -> float:
    """Seconds since this process started, to a hundredth.

    psutil's time of creation is up to a second early: the time of boot that it adds has whole seconds.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Session:
    """One command: its processes, who may stop it, and what its user allows."""

    world: World
    stop: StopRequests = field(default_factory=StopRequests)
    allow_config_change: bool = False
    """Go on with a run that another stage file, or other data, began."""
    verbose: bool = False
    """Show what libraries say, too."""
    clock: StartClock = field(default_factory=StartClock)
    waiting: Waiting = field(default_factory=Waiting)
    """Says what is being done before the first step, and after the last."""
