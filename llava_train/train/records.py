"""The JSONL files of a run: metrics, quarantine, steps not taken, answers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_train.files import write_durably
from llava_train.run_files import QUARANTINE_FILE, RECORD_FILES, read_records
from llava_train.train.world import World


class Records:
    """Appends to the files. Rank 0 writes all of them, other ranks only to the quarantine.

    Args:
        start_step: steps done before; records of later steps, from before an interruption, are dropped.
    """

    def __init__(self, folder: Path, world: World, start_step: int) -> None:
        self.folder, self.world = folder, world
        self._unwritten: dict[str, list[str]] = {}
        self._warned = False
        if world.is_main:
            last = start_step or -1  # a run that begins anew evaluates before its first step again: as step 0
            for name in RECORD_FILES:
                _drop_after(folder / name, last)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Adds a line to a file of this rank."""
        if self.world.is_main or name == QUARANTINE_FILE:
            self._unwritten.setdefault(name, []).append(_line(record))
            self._write(name)

    def sync(self) -> None:
        """Puts the records on disk, as far as there is room."""
        for name in [name for name, lines in self._unwritten.items() if lines]:
            self._write(name)
        for name in RECORD_FILES:
            with suppress(OSError), (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def _write(self, name: str) -> None:
        """Appends what waits for a file; a full disk costs a warning, and the lines wait until there is room."""
        path, n_bytes = self.folder / name, None
        try:
            with path.open("a", encoding="utf-8") as file:
                n_bytes = file.tell()
                file.write("".join(self._unwritten[name]))
        except OSError as error:
            if n_bytes is not None and name != QUARANTINE_FILE:  # other ranks may have added to that one
                os.truncate(path, n_bytes)  # a line that was half written
            if not self._warned:
                print(f"warning: cannot write {path}: {error.strerror}; its lines wait", flush=True)
            self._warned = True
        else:
            self._unwritten[name], self._warned = [], False


def _drop_after(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, and a line that was cut off, from a JSONL file."""
    if path.is_file():
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_durably(path, "".join(map(_line, kept)))


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON may hold half a character, as an escape


def _without_nan(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
