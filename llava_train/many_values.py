"""`--config a.yaml b.yaml`: options that take several values after one flag, as argparse's `nargs="+"` does.

click has no such options, only `--config a.yaml --config b.yaml`; the command class here writes the one as the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand

FLAGS = ("--config", "--set")


class ManyValues(TyperCommand):
    """A command whose `--config` and `--set` take all values up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(repeat_flags(args, FLAGS)))


def repeat_flags(arguments: Iterable[str], flags: Iterable[str]) -> Iterator[str]:
    """Repeats a flag before each of its further values.

    `--config a b --nodes 4` becomes `--config a --config b --nodes 4`.
    """
    flag, n_values = None, 0
    for argument in arguments:
        if argument.startswith("-"):
            flag, n_values = (argument if argument in flags else None), 0
        else:
            if flag and n_values:
                yield flag
            n_values += 1
        yield argument
