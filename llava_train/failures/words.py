"""What is known of a failure, and the words for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WIDEST = 240
"""Characters of a line, where names and paths are of ordinary length."""
_WIDEST_OF_LIBRARIES = 600
_MOST_LINKS = 16


@dataclass(frozen=True)
class Context:
    """What is known of the moment of a failure."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0
    doing: str = ""
    """What was being done, `forward and backward of step 3`; empty where nobody knows."""
    run_dir: Path | None = None
    """The folder of the run; None for commands that have none."""
    subject: str = ""
    """What was to be loaded: a hub id or a folder."""
    is_run: bool = False
    """Whether stages are trained, so that the same command goes on."""

    @property
    def during(self) -> str:
        return f" in {self.doing}" if self.doing else ""


@dataclass(frozen=True)
class Explanation:
    """A failure in words."""

    what: str
    mend: tuple[str, ...]
    """What to do, a line each."""
    subject: str = ""
    by_another_rank: bool = False
    """It only follows from the failure of another rank."""
    by_user: bool = False
    """A name, an account or a setting of the user is wrong, so that a traceback would tell nothing more."""

    def __str__(self) -> str:
        return "\n".join([self.what, *self.mend])


Explain = Callable[[BaseException, Context], Explanation | None]
"""What one kind of failure means; None where it is another kind."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those that it came from."""
    link: BaseException | None = error
    for _ in range(_MOST_LINKS):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def first_lines(error: BaseException, n_lines: int = 2) -> str:
    """The beginning of an exception's message; of one that a loader's worker sent, the end, where it stands there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and " in DataLoader worker process " in lines[0]:
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return "\n".join(shortened(line, _WIDEST_OF_LIBRARIES) for line in lines[:n_lines]) or type(error).__name__


def shortened(line: str, most: int = WIDEST - 40) -> str:
    return line if len(line) <= most else f"{line[: most - 3]}..."


def is_a(error: BaseException, name: str) -> bool:
    """Whether an exception is of a class, `module.Class`, whose module need not be loaded."""
    module, _, class_name = name.rpartition(".")
    found = getattr(sys.modules.get(module), class_name, None)
    return isinstance(found, type) and isinstance(error, found)
