"""What one command shares over its stages, and where the time before the first step goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil

from llava_train.train.interrupt import StopRequests
from llava_train.train.world import World


class StartClock:
    """Seconds of each part of a start, from the start of the process to the first step."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._last = psutil.Process().create_time()

    def mark(self, part: str) -> None:
        """What ran since the mark before was `part`."""
        now = time.time()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def line(self) -> str | None:
        """The parts in words, once; a later stage of the command counts from here."""
        parts, self._parts = self._parts, {}
        if not parts:
            return None
        shares = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        return f"first step after {sum(parts.values()):.1f} s: {shares}"


@dataclass
class Session:
    """One command: its processes, who may stop it, and what its user allows."""

    world: World
    stop: StopRequests = field(default_factory=StopRequests)
    allow_config_change: bool = False
    """Go on with a run that another stage file, or other data, began."""
    clock: StartClock = field(default_factory=StartClock)
