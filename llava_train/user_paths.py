"""Paths as people write them: `~` is the home folder; a variable such as `$HOME` is refused.

A shell replaces both on a command line, but not in a stage file, in quotes or behind `--set key=`. A stage file must
mean the same in every shell and job, so variables are refused everywhere, and `~` is replaced everywhere.
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_train.errors import UserError

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}|\([^)]*\))")


class PathError(UserError):
    """A path that cannot be understood. The message says what to write instead."""


def expand(path: str) -> str:
    """Return `path` with `~` or `~user` at its start replaced by a home folder.

    Addresses (`https://...`) and names of the hub are returned as they are.

    Raises:
        PathError: a variable, an unknown user, a folder that is really named `~`, or half of a character.
    """
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in path):
        raise PathError(f"{path[:200]!r} holds a character that no path can have; write the path in UTF-8")
    if "://" in path or path.startswith("data:"):
        return path
    if (variable := _VARIABLE.search(path)) and not _exists(path):
        raise PathError(
            f"{path:.200}: {variable[0]} is a variable, and variables are not replaced here; write the whole path, or "
            "~ for the home folder"
        )
    if not path.startswith("~"):
        return path
    user = path.partition("/")[0]
    try:
        expanded = str(Path(path).expanduser())
    except RuntimeError:  # expanduser's, for an unknown user
        who = "the home folder is not known here (HOME is not set)" if user == "~" else f"there is no user {user[1:]}"
        raise PathError(
            f"{path:.200}: {who}; write the whole path, or ./{path:.200} for a folder that is named so"
        ) from None
    if _exists(path) and Path(path).resolve() != Path(expanded).resolve():
        raise PathError(
            f"{path:.200} means {expanded:.200}, but there is a folder named {user} here, as earlier versions made it: "
            f"move {Path(path).absolute()} to {expanded:.200}, or write ./{path:.200}"
        )
    return expanded


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False
