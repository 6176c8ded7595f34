"""The one base of all errors that a user can mend, and how a command ends with it. See `failures` for all others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OF_THE_COMMAND_LINE = ("typer", "click")


class UserError(ValueError):
    """What the user gave cannot be used. The message names the file, the key or the sample, and the mend.

    The command line shows it without a traceback, once.
    """

    on_every_rank: bool = True
    """False for what only one rank of a run can see, so that this rank must say it."""
    told_by_main: bool = False
    """Rank 0 has said it already."""
    keeps_traceback: bool = False
    """Whether a library or the machine failed, so that the traceback is worth a file."""


class Note(UserWarning):
    """Something that is handled, but that the user may not have meant. Commands print it as one line."""


class OtherRankFailed(RuntimeError):
    """This rank can't go on, for another one failed, which says why."""


@contextmanager
def user_errors(command: str = "") -> Iterator[None]:
    """Ends a command in a few lines: with exit code 2 for what the user can mend, 130 after Ctrl-C, 1 for the unknown.

    Args:
        command: what it does, in words; empty for what was typed.
    """
    try:
        try:
            yield
        finally:
            _write_printed()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # of a reader such as `head`, which has enough
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] in _OF_THE_COMMAND_LINE:
            raise
        from llava_train.failures import of_command
        from llava_train.last_words import tell

        raise SystemExit(tell(error, of_command(command))) from None


def _write_printed() -> None:
    """Writes what was printed and waits in a buffer, while a failure can still be reported. Raises UserError."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's end would try again
        raise UserError(f"standard output cannot be written: {error.strerror}") from error
