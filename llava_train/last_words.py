"""How a process ends that failed: at most eight lines for its user, and the traceback in a file that they name."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from llava_train import __version__
from llava_train.errors import UserError
from llava_train.failures import explain, explain_file
from llava_train.failures.words import Context, Explanation, first_lines, shortened
from llava_train.run_files import CACHE_FOLDER, ERRORS_FOLDER

MENDABLE, UNKNOWN = 2, 1
"""Exit codes."""
_KEPT = 20
"""Files of tracebacks in a folder; at least two of each rank."""
_PACKAGE = Path(__file__).parent
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
_SECRET = re.compile(r"\bhf_\w{16,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)")
_HIDDEN = "[hidden]"


def tell(error: Exception, context: Context, verbose: bool = False) -> int:
    """Keeps the traceback, and says why this process ends, if it is its place to say so. Returns the exit code."""
    explained = explain(error, context) or (None if isinstance(error, UserError) else explain_file(error, context))
    code = MENDABLE if isinstance(error, UserError) or (explained and not explained.by_another_rank) else UNKNOWN
    keeps = explained is not None or not isinstance(error, UserError) or error.keeps_traceback
    keeps = keeps and not (explained and explained.by_user)
    kept = keep(error, context) if keeps else None
    if not speaks(error, context):
        return code
    said = redacted("\n".join(message(error, explained, context, kept)), os.environ)
    with suppress(OSError):  # nobody may read it any more
        if verbose and keeps:
            print(redacted("".join(traceback.format_exception(error)), os.environ), file=sys.stderr)
        print(said, file=sys.stderr, flush=True)
    return code


def speaks(error: Exception, context: Context) -> bool:
    """Whether this rank tells of an error. What all see is told once a machine: the others may not see it."""
    if not isinstance(error, UserError):
        return True
    return not error.told_by_main and (context.rank == 0 or context.local_rank == 0 or not error.on_every_rank)


def message(error: Exception, explained: Explanation | None, context: Context, kept: Path | str | None) -> list[str]:
    """The last words of a rank, in lines.

    Args:
        kept: where the traceback is, or why it is nowhere; None where it tells nothing more.
    """
    if explained and explained.by_another_rank:
        return [f"rank {context.rank} stopped{context.during}: {explained.what} ({_where(kept)})"]
    where = [] if kept is None else [_where(kept)]
    if isinstance(error, UserError):
        named = context.rank == 0 or f"rank {context.rank}" in str(error).partition("\n")[0]
        return [f"error: {'' if named else f'rank {context.rank}: '}{error}", *where]
    who = f"rank {context.rank}: " if context.n_ranks > 1 else ""
    goes_on = _goes_on(context)
    if explained:
        subject = f"{explained.subject}: " if explained.subject else ""
        return [f"error: {who}{subject}{explained.what}", *explained.mend, *where, *goes_on]
    place = own_place(error)
    return [
        f"error: {who}llava_train failed{context.during}, and does not know why",
        f"{type(error).__name__}: {shortened(first_lines(error, 1))}" + (f" (at {place})" if place else ""),
        *where,
        *goes_on,
        "Should it fail there again, please report it with that file and what `llava-train doctor` prints.",
    ]


def _goes_on(context: Context) -> list[str]:
    if not context.is_run or context.run_dir is None:
        return []
    return [f"The same command goes on from {goes_on_from(context)}."]


def goes_on_from(context: Context) -> str:
    """Where the next start of a run begins, in words."""
    has_saved = context.run_dir is not None and any(context.run_dir.glob("checkpoints/step-*"))
    return "the newest checkpoint" if has_saved else "the beginning"


def _where(kept: Path | str | None) -> str:
    return f"traceback: {kept}" if isinstance(kept, Path) else f"traceback not kept: {kept}"


def own_place(error: BaseException) -> str:
    """The innermost line of this package that an exception passed: `train/loop.py:120 in train`."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _PACKAGE in Path(frame.filename).parents:
            found = f"{Path(frame.filename).relative_to(_PACKAGE.parent)}:{frame.lineno} in {frame.name}"
    of_worker = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', str(error))
    for name, line, function in of_worker:  # what a loader's worker sent
        if _PACKAGE in Path(name).parents:
            found = f"{Path(name).relative_to(_PACKAGE.parent)}:{line} in {function}"
    return found


def keep(error: BaseException, context: Context) -> Path | str:
    """Writes the traceback to a file, and deletes the oldest such files; returns its path, or why there is none."""
    text = redacted(
        f"{datetime.now().isoformat(' ', 'seconds')}, llava_train {__version__}, rank {context.rank} of "
        f"{context.n_ranks}{context.during}\n{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}",
        os.environ,
    )
    problem = "no folder"
    for folder in _folders(context.run_dir):
        try:
            return _write(folder, context, text)
        except OSError as failure:
            problem = failure.strerror or str(failure)
    return problem


def _folders(run_dir: Path | None) -> Iterator[Path]:
    if run_dir is not None:
        of_run, of_all = run_dir / ERRORS_FOLDER, run_dir.parent / CACHE_FOLDER / ERRORS_FOLDER
        yield from (folder for folder in (of_run, of_all) if folder.parent.is_dir())  # a run may not have begun
    with suppress(OSError):  # on a full disk there is no temporary folder either
        of_user = Path(tempfile.gettempdir()) / f"llava_train-{os.getuid()}" / ERRORS_FOLDER
        of_user.parent.mkdir(mode=0o700, exist_ok=True)
        status = of_user.parent.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():  # and not what somebody else put there
            yield of_user
            return
    with suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix="llava_train-"))


def _write(folder: Path, context: Context, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}"
    path = folder / f"{stem}-rank{context.rank}.txt"
    if path.exists():
        path = folder / f"{stem}-{os.getpid()}-rank{context.rank}.txt"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    with suppress(OSError):
        for old in sorted(folder.glob("*-rank*.txt"))[: -max(_KEPT, 2 * context.n_ranks)]:
            old.unlink(missing_ok=True)
    return path


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """A text without the tokens and passwords of an environment, and without what looks like one."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    return _SECRET.sub(_HIDDEN, text)
