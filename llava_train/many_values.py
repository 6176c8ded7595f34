"""`--config a.yaml b.yaml`: options that take several values after one flag, as argparse's `nargs="+"` does.

click has no such options, only `--config a.yaml --config b.yaml`: `cli_help.Command` writes the one as the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

FLAGS = ("--config", "--set")


def repeat_flags(arguments: Iterable[str], flags: Collection[str]) -> Iterator[str]:
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
