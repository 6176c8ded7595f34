"""The one base of all errors that a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What the user gave cannot be used. The message names the file, the key or the sample, and the mend.

    The command line shows it without a traceback, once.
    """

    on_every_rank: bool = True
    """False for what only one rank of a run can see, so that this rank must say it."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends a command with exit code 2 and one line for what the user can mend."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
