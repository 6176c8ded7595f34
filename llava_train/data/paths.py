"""What to write instead of a path that leads nowhere: addresses, patterns, Windows paths, characters in code."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
"""One slash will do: Python's paths hold no two in a row."""
_HUB_PAGE = re.compile(r"(?:https?|hf):/+(?:huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_COPY = {
    "s3": "aws s3 cp --recursive",
    "gs": "gcloud storage cp -r",
    "http": "wget",
    "https": "wget",
}


def advice_on_path(path: str) -> str:
    """Says what to write instead of a path that does not exist; empty where nothing is wrong with its form."""
    if scheme := _SCHEME.match(path):
        return _advice_on_address(path, scheme)
    if _WINDOWS.match(path):
        return "this is a path of Windows; write it as this system has it, with / (in WSL, C:\\x is /mnt/c/x)"
    if problem := unencodable(path):
        return problem
    for spelling, what in ((unquote(path), "it is percent-encoded"), (path.replace("\\", "/"), "folders end in /")):
        if spelling != path and _exists(spelling):
            return f"{what}; write {spelling}"
    if "%" in path and unquote(path) != path:
        return f"it is percent-encoded, as addresses are; write the characters themselves: {unquote(path)}"
    if any(character in path for character in "*?["):
        return _advice_on_pattern(path)
    return ""


def unencodable(path: str) -> str:
    """Says that the locale has no bytes for the name of a file; empty where it has."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        return (
            f"the locale cannot encode {path[error.start : error.end]!r} in the name of a file (it has "
            f"{sys.getfilesystemencoding()}); set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8, and start again"
        )
    return ""


def _advice_on_address(path: str, scheme: re.Match[str]) -> str:
    name = scheme[1].lower()
    if name == "file":
        rest = path[len("file:") :]
        rest = rest.removeprefix("//localhost") if rest.startswith("//localhost/") else f"/{rest.lstrip('/')}"
        return f"this is an address; write the path alone: {unquote(rest)}"
    if page := _HUB_PAGE.match(path):
        return f"this is an address; name a data set of the hub by its id: {page[1]}"
    how = f" ({_COPY[name]})" if name in _COPY else ""
    return f"this is an address, and only files of this machine are read; copy it here{how} and write its path"


def _advice_on_pattern(path: str) -> str:
    anchor, example = Path(path).anchor, ""
    with suppress(OSError, ValueError, NotImplementedError):
        found = next(Path(anchor).glob(str(Path(path).relative_to(anchor))), None)
        example = f" (this one matches {found})" if found else " (and nothing matches this one)"
    return f"patterns are not expanded{example}; write a source for each file, or name their folder"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False
