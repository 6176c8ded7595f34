"""Standard output as a terminal, or a log; and what a run is doing while nothing else moves. Needs no torch."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text


class _OfRun(Console):
    """Standard output of a run, which does not end without a word where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        raise  # rich would exit


def new_console(speaks: bool = True) -> Console:
    """Standard output; a terminal only where it is one, whatever machines for CI say."""
    return _OfRun(quiet=not speaks, force_terminal=sys.stdout is not None and sys.stdout.isatty())


def write_anything() -> None:
    """Lets standard output take characters that its encoding lacks, as escapes: no answer of a model may end a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Pipe(io.FileIO):
    """Standard output or error of a command. What is written after its reader has left, such as `head`, is dropped."""

    is_read = True

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            self.is_read = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(content)


def allow_readers_to_leave() -> None:
    """Lets a command do its work to the end where nobody reads what it prints any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # else it is another's, as in a notebook
            stream.flush()
            pipe = _Pipe(stream.fileno(), "w", closefd=False)
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(pipe),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
            )
            setattr(sys, name, wrapped)


def is_read() -> bool:
    """Whether somebody may still read standard output, as far as `allow_readers_to_leave` knows."""
    return bool(getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "is_read", True))


def new_live(console: Console, shown: RenderableType = "", transient: bool = False) -> Live:
    """A line that moves on a terminal. What libraries print meanwhile stands above it, but for errors sent elsewhere.

    It has no thread of its own: a worker that is forked while one writes would inherit its lock.
    """
    to_terminal = sys.stderr is not None and sys.stderr.isatty()
    return Live(shown, console=console, auto_refresh=False, transient=transient, redirect_stderr=to_terminal)


def drop_unread() -> None:
    """Drops what standard output still holds where its reader has gone, so that Python's end does not complain."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Waiting:
    """Says what is being done in a line that goes again, on a terminal; nothing in a log, nor unless `speaks`."""

    def __init__(self, speaks: bool = True) -> None:
        self.console = new_console(speaks)
        """What else is shown meanwhile must go through it, or print."""
        self._live = new_live(self.console, transient=True)
        self._moves = speaks and self.console.is_interactive

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def show(self, activity: str) -> None:
        """What is begun now."""
        if self._moves:
            self._live.start()
            self._live.update(Text(f"{activity} ...", style="dim"), refresh=True)

    def stop(self) -> None:
        """Takes the line away; `show` brings it back."""
        self._live.stop()
