"""Runs `scripts/train.py` while something happens to it.

    python -m tests.train.fault_rank '{"1": [["kill_in_step", {"step": 3}]]}' --config STAGE ...

The product is not changed: the faults of this rank are installed before the run begins, by an audit hook or around a
function.

The *boundaries* of a phase (a save, the start, the result) are what a rank does there to the files of the run: each
opening for writing, renaming, making, removing, and each fsync. A rank can be killed at the n-th before it happens;
at an fsync after half of the file is cut off, for what was not synced may not be on disk; or, torn, at any boundary
after half of the file that was written last is cut off. Instead, the run's folder can be copied at every boundary, as a
kill there would leave it: one run then stands for as many that are killed.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from llava_train.train import checkpoint, interrupt, loop, stage
from tests.train.helpers import TRAIN

FAULTS_VARIABLE = "LLAVA_TRAIN_FAULTS"


class Boundaries:
    """Counts what this process does to the files below `folder` while `armed`; keeps, copies or kills."""

    def __init__(self, folder: Path, kill_at: int | None, torn: bool, record: Path | None, copies: str | None) -> None:
        self.folder, self.kill_at, self.torn, self.record = folder.resolve(), kill_at, torn, record
        self.copies = copies
        self.armed = False
        self.seen: list[str] = []
        self._fsync = os.fsync
        os.fsync = self._watch_fsync
        sys.addaudithook(self._audit)

    def disarm(self) -> None:
        self.armed = False
        if self.record:
            self.record.write_text(json.dumps(self.seen))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._meet("open", path)
        elif event == "os.rename":
            self._meet("rename", arguments[0], arguments[2], arguments[1])
        elif event in ("os.remove", "os.rmdir"):
            self._meet(event.removeprefix("os."), arguments[0], arguments[1])
        elif event == "os.mkdir":
            self._meet("mkdir", arguments[0], arguments[2])
        elif event in ("os.truncate", "shutil.rmtree"):
            self._meet(event.split(".")[1], arguments[0])

    def _watch_fsync(self, descriptor: int) -> None:
        if self.armed:
            path = _opened(descriptor)
            writes = not path.is_dir() and bool(_flags(descriptor) & (os.O_WRONLY | os.O_RDWR))
            self._meet("fsync", path, half=path if writes else None)
        self._fsync(descriptor)

    def _meet(self, kind: str, path: Any, folder: int = -1, target: Any = None, half: Path | None = None) -> None:
        place = _absolute(path, folder)
        if self.folder not in place.parents:
            return
        self.armed = False  # what follows is not the product's
        name = f"{kind} {place.relative_to(self.folder)}"
        if target is not None:
            name += f" -> {_absolute(target, -1).relative_to(self.folder)}"
        self.seen.append(name)
        if self.copies:
            copy = self.folder.parent.with_name(self.copies.format(len(self.seen))) / self.folder.name
            shutil.copytree(self.folder, copy)
            self._cut(copy, half)
        if len(self.seen) == self.kill_at:
            self._cut(self.folder, half)
            os.kill(os.getpid(), signal.SIGKILL)
        self.armed = True

    def _cut(self, run: Path, half: Path | None) -> None:
        """Cuts off half of a file of `self.folder`, in that folder or in a copy of it."""
        path = _newest(run) if self.torn else half and run / half.relative_to(self.folder)
        if path:
            os.truncate(path, path.stat().st_size // 2)


def _flags(descriptor: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _absolute(path: Any, folder: int) -> Path:
    """Where a path lies that is given relative to an opened folder."""
    if isinstance(path, int):
        return _opened(path)
    within = _opened(folder) if folder >= 0 else Path.cwd()
    return within / os.fsdecode(path)


def _newest(folder: Path) -> Path | None:
    """The file of a result that was written last."""
    files = [path for part in ("model", "adapter") for path in (folder / part).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns) if files else None


def around(
    owner: Any, name: str, when: Callable[..., bool], before: Callable[[], Any], after: Callable[[], Any]
) -> None:
    """Calls `before` and `after` around those calls of `owner.name` that `when` picks."""
    original = getattr(owner, name)

    @wraps(original)
    def watched(*arguments: Any, **named: Any) -> Any:
        if not when(*arguments, **named):
            return original(*arguments, **named)
        before()
        try:
            return original(*arguments, **named)
        finally:
            after()

    setattr(owner, name, watched)


def at_save(step: int) -> tuple[Any, str, Callable[..., bool]]:
    return loop.Loop, "_save", lambda self, saved: saved == step


def boundaries(
    folder: str,
    phase: str,
    step: int = 0,
    kill_at: int | None = None,
    torn: bool = False,
    record: str | None = None,
    copies: str | None = None,
) -> None:
    """Kills at a boundary of the run in `folder`, records them all, or copies the folder at each.

    Args:
        copies: the name of the folder beside `folder`'s parent that takes its place, with `{}` for the number.
    """
    found = Boundaries(Path(folder), kill_at, torn, Path(record) if record else None, copies)

    def arm() -> None:
        found.armed = True

    if phase == "save":
        around(*at_save(step), arm, found.disarm)
    elif phase == "result":
        around(stage, "write_result", lambda *_: True, arm, found.disarm)
    else:
        assert phase == "start"
        arm()
        around(loop.Loop, "train", lambda *_: True, found.disarm, lambda: None)


def kill_in_step(step: int) -> None:
    """Kills after the backward pass of a step, before the optimizer takes it."""

    def kill(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        loop.optimizer_step = kill

    around(loop, "train_step", lambda engine, world, batch, *_: batch.step + 1 == step, arm, lambda: None)


def freeze_in_step(step: int) -> None:
    """Stops the process before a step, as a machine that hangs."""
    freeze = partial(os.kill, os.getpid(), signal.SIGSTOP)
    around(loop, "train_step", lambda engine, world, batch, *_: batch.step + 1 == step, freeze, lambda: None)


def pause(step: int, until: str, noted: str | None = None) -> None:
    """Waits before a step until there is a file `until`: meanwhile the test acts. Then stop files are seen at once.

    Args:
        noted: a file that is made when a signal has been noted.
    """

    def wait() -> None:
        while not Path(until).exists():
            time.sleep(0.01)
        interrupt._LOOK_EVERY_S = -1.0

    around(loop, "train_step", lambda engine, world, batch, *_: batch.step + 1 == step, wait, lambda: None)
    if noted:
        around(interrupt.StopRequests, "_note", lambda *_: True, lambda: None, Path(noted).touch)


def limit_file_size(step: int, n_bytes: int) -> None:
    """No file may become larger than so many bytes in the save of a step: EFBIG, as of a quota."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))

    around(*at_save(step), limit(n_bytes), limit(resource.RLIM_INFINITY))


def claim_room(step: int, n_bytes: int) -> None:
    """The file system claims to have so many bytes left in the save of a step."""
    true = shutil.disk_usage

    def claim(path: Any) -> Any:
        return true(path)._replace(free=n_bytes)

    def put(function: Any) -> Callable[[], None]:
        return lambda: setattr(shutil, "disk_usage", function)

    around(*at_save(step), put(claim), put(true))


def no_space_for_manifest(step: int) -> None:
    """The disk is full when the manifest of a checkpoint is written."""
    true = checkpoint.write_manifest

    def fail(*_: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def put(function: Any) -> Callable[[], None]:
        return lambda: setattr(checkpoint, "write_manifest", function)

    around(*at_save(step), put(fail), put(true))


def shell(step: int, before: str, after: str) -> None:
    """Runs a command before the save of a step, and another one after it."""

    def call(command: str) -> Callable[[], Any]:
        return lambda: subprocess.run(command, shell=True, check=True)

    around(*at_save(step), call(before), call(after))


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        boundaries,
        kill_in_step,
        freeze_in_step,
        pause,
        limit_file_size,
        claim_room,
        no_space_for_manifest,
        shell,
    )
}


def main() -> None:
    if FAULTS_VARIABLE in os.environ:  # launchers put arguments of their own before ours
        faults, *arguments = os.environ[FAULTS_VARIABLE], *sys.argv[1:]
    else:
        faults, *arguments = sys.argv[1:]
    for name, options in json.loads(faults).get(os.environ["RANK"], []):
        FAULTS[name](**options)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
