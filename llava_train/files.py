"""Files that are whole or as they were, and folders that are complete or ignored, by a manifest that is written last.

The manifest has sizes and checksums: XXH3 of 128 bits, which finds what a disk or a power cut did, at the speed of
memory. It is no protection against somebody who can write to the folder, for he can write the manifest too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import xxhash

from llava_train.git_lfs import lfs_problem

MANIFEST = "COMPLETE"
_CHECKSUM = "xxh128"
"""Key of a manifest's own checksum: a flipped bit in it could send a run to another step in silence."""
_CHUNK_BYTES = 1 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OWN_FOLDERS = ("data", "parts", "runs")
"""Folders of our recipes: below them nobody means the hub, also where they were not made yet."""

FileFacts = dict[str, Any]
"""Size (`n_bytes`) and checksum (`xxh128`) of a file."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name means a repository of the hub: `owner/name`, and there is no folder `owner` that lacks it."""
    path = Path(name)
    is_ours = path.parent.name in _OWN_FOLDERS
    return bool(_HUB_ID.fullmatch(str(name))) and not is_ours and not path.exists() and not path.parent.is_dir()


def write_manifest(folder: Path, files: dict[str, FileFacts] | None = None, **facts: Any) -> None:
    """Declares a folder complete, durably: every file in it with its size and checksum, and `facts`.

    Call it on one rank, after all ranks have finished writing.

    Args:
        files: by name, what was written; by default the files are read.
    """
    if files is None:
        files = {str(path.relative_to(folder)): file_facts(path) for path in _files(folder)}
    manifest = {**facts, "files": files}
    write_durably(folder / MANIFEST, json.dumps({**manifest, _CHECKSUM: _checksum(manifest)}, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` was told, or None when the folder was never completed, or the manifest is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.pop(_CHECKSUM, None) != _checksum(manifest):
        return None
    return manifest


def damage(folder: Path, share: slice = slice(None)) -> str | None:
    """Why a folder must not be used, or None when every file is as its manifest says.

    Args:
        share: which of the files to read, so that several ranks can divide them.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST} manifest"
    for name, expected in list(manifest["files"].items())[share]:
        path = folder / name
        try:
            n_bytes = path.stat().st_size
            if n_bytes != expected["n_bytes"] and (problem := lfs_problem(path)):
                return problem
            if n_bytes != expected["n_bytes"] and (problem := lfs_problem(path)):
                return problem
            if n_bytes != expected["n_bytes"]:
                return f"{name} has {n_bytes} bytes, not {expected['n_bytes']}"
            if file_facts(path) != expected:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


@contextmanager
def written_aside(path: Path, mode: Literal["w", "wb"] = "w", durably: bool = True) -> Iterator[IO[Any]]:
    """Opens a file to write that takes the place of `path` at the end of the block; if the block raises, nothing does.

    So `path` is never half a file. Its folder is made, a link is followed, and the permissions of the file that it
    replaces stay. What is no regular file (a pipe, /dev/null) is written in place. Of text, halves of characters are
    written as the escapes that JSON has for them.

    Args:
        durably: wait until the disk has it, so that the machine may stop afterwards.

    Raises:
        OSError: the file cannot be written, or is write-protected.
    """
    text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "errors": "backslashreplace"}
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        with path.open(mode, **text) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=target.parent, prefix=".written-aside-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(number, mode, **text) as file:
            yield file
            file.flush()
            if durably:
                os.fsync(file.fileno())
        share(temporary)
        with suppress(OSError):  # there is no file yet, or its permissions cannot be had
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        if durably:
            rename_durably(temporary, target)
        else:
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(out: Path) -> Iterator[Path]:
    """Makes a folder beside `out` that takes its place at the end of the block; if the block raises, `out` stays."""
    folder, replaced = (out.with_name(f".{out.name}.{what}") for what in ("written", "replaced"))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            out.rename(replaced)
        rename_durably(folder, out)
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        for each in (folder, replaced):
            shutil.rmtree(each, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    """Writes a file of a run so that it is whole or absent, whenever the machine stops."""
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def rename_durably(source: Path, target: Path) -> None:
    """Renames a file or folder so that the machine may stop afterwards."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ChecksummedFile:
    """A file to write that computes its size and checksum on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._n_bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes | memoryview) -> int:
        n_written = self._file.write(data)
        self._digest.update(data)
        self._n_bytes += n_written
        return n_written

    def flush(self) -> None:
        self._file.flush()

    def facts(self) -> FileFacts:
        return {"n_bytes": self._n_bytes, "xxh128": self._digest.hexdigest()}


def share(*paths: Path) -> None:
    """Gives files, and those in folders, the permissions of new ones: safetensors lets only the owner read its own."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                file.chmod(0o666 & ~mask)


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"n_bytes": path.stat().st_size, "xxh128": digest.hexdigest()}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _files(folder: Path) -> list[Path]:
    """All but the manifest, which may be half written by a process that was killed."""
    manifests = (MANIFEST, _temporary(folder / MANIFEST).name)
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in manifests)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
