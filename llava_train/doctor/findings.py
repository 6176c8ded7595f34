"""What the doctor says: findings, and how they are kept free of what is nobody else's business."""

from __future__ import annotations

import getpass
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Level(str, Enum):
    """How good or bad a finding is. Only `broken` fails the examination."""

    ok = "ok"
    note = "note"
    warning = "warning"
    broken = "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    level: Level
    text: str
    mend: str = ""
    """What to do about it; a command where there is one."""


def found(topic: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check. A check that fails is a finding itself: the doctor must outlive what it looks at."""
    try:
        return list(check())
    except Exception as error:  # of any library that a check asks
        return [Finding(topic, Level.warning, f"could not be looked at: {type(error).__name__}: {error}")]


def discreet(text: str) -> str:
    """A text without the names of this user and of temporary folders.

    "/home/ada/work" becomes "~/work", and "/scratch/ada/runs" becomes "/scratch/USER/runs".
    """
    with suppress(OSError):  # there is none that can be written
        text = text.replace(tempfile.gettempdir() + "/", "TMP/")
    home = str(Path.home())
    if home != "/":
        text = text.replace(home, "~")
    with suppress(Exception):  # a user without a name, as in containers
        text = re.sub(rf"/{re.escape(getpass.getuser())}\b(?![-.])", "/USER", text)
    return text
