"""Arrow tables that are built once and memory-mapped ever after, by every process of a machine.

A table is kept in a cache folder under the name of its file and a fingerprint of that file's place, size and time
of change. It is written under a temporary name and renamed, so that it is whole or absent; one process builds it,
the others wait.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from llava_train.data.problems import DataError
from llava_train.failures import reason

_ROWS_A_BATCH = 4096


def built_once(
    what: str, path: Path, cache: Path | None, schema: pa.Schema, rows: Callable[[], Iterable[tuple]], version: int
) -> pa.Table:
    """The table of `rows()`, made from the file `path`.

    Args:
        what: names the table among those of the file.
        cache: folder to keep it in; None keeps it in memory.
        rows: yields the rows, columns in the order of `schema`.
        version: of the way `rows` reads the file.

    Raises:
        DataError: the cache cannot be written.
    """
    if cache is None:
        batches = list(_batches(rows(), schema))
        return pa.Table.from_batches(batches, schema)
    kept = cache / f"{path.name}-{what}-{_fingerprint(path, version)}.arrow"
    try:
        with suppress(FileNotFoundError, pa.ArrowInvalid):  # not built yet, or torn by a power cut
            return _mapped(kept)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):
            with suppress(FileNotFoundError, pa.ArrowInvalid):
                return _mapped(kept)
            _write(kept, schema, rows())
            return _mapped(kept)
    except OSError as error:
        raise DataError(f"{kept}: cannot keep what was read from {path}, below `output:`: {reason(error)}") from error


def _mapped(kept: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(kept))).read_all()


def _fingerprint(path: Path, version: int) -> str:
    status = path.stat()
    stated = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{version}"
    return hashlib.sha256(stated.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _write(kept: Path, schema: pa.Schema, rows: Iterable[tuple]) -> None:
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in _batches(rows, schema):
                writer.write_batch(batch)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(kept)
    finally:
        temporary.unlink(missing_ok=True)


def _batches(rows: Iterable[tuple], schema: pa.Schema) -> Iterable[pa.RecordBatch]:
    rows = iter(rows)
    while chunk := list(islice(rows, _ROWS_A_BATCH)):
        columns = [pa.array(column, type) for column, type in zip(zip(*chunk, strict=True), schema.types, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
