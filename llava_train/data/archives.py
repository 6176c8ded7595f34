"""Pictures in ZIP and TAR archives, read in place: a cluster counts files, and half a million of them are too many.

The archive's table of contents is read once into a memory-mapped index (name, place, size), sorted by name; a picture
is then one look-up and one read, in any process, without opening the archive as a whole.
"""

from __future__ import annotations

import bisect
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import pyarrow as pa

from llava_train.data.built_once import built_once
from llava_train.data.pictures import Picture
from llava_train.data.problems import DataError, SampleError, shortened
from llava_train.git_lfs import lfs_problem

_SCHEMA = pa.schema(
    {
        "name": pa.large_string(),
        "offset": pa.int64(),  # ZIP: of the member's own header; TAR: of its content
        "n_stored": pa.int64(),
        "n_bytes": pa.int64(),
        "is_deflated": pa.bool_(),
        "crc": pa.uint32(),  # null in a TAR
    }
)
_VERSION = 1
_LARGEST = 1 << 28
"""Bytes of an encoded picture: more is no picture for a language model."""
_ENCRYPTED = 0x1
_ZIP_HEADER = struct.Struct("<4s22xHH")
_ZIP_MAGIC = b"PK\x03\x04"


class PictureArchive:
    """The pictures of one archive, by the name they have there."""

    def __init__(self, path: Path, index: pa.Table) -> None:
        self.path = path
        self._index, self._names = index.combine_chunks(), index["name"].combine_chunks()

    @classmethod
    def open(cls, path: Path, cache: Path | None = None) -> PictureArchive:
        """An archive, told by its content. Raises DataError."""
        if problem := lfs_problem(path):
            raise DataError(problem)
        if zipfile.is_zipfile(path):
            contents = _zip_contents
        elif _is_tar(path):
            contents = _tar_contents
        else:
            raise DataError(
                f"{path}: neither a folder nor a ZIP or plain TAR archive; a compressed TAR cannot be read in place, "
                "so decompress it first"
            )
        try:
            index = built_once("contents", path, cache, _SCHEMA, lambda: sorted(contents(path)), _VERSION)
        except (zipfile.BadZipFile, tarfile.TarError, UnicodeError, struct.error) as error:
            raise DataError(f"{path}: the archive is damaged: {error}") from error
        return cls(path, index)

    def find(self, name: str) -> Picture:
        """The member of that name. Raises SampleError."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise SampleError("path_outside_root", f"image path {shortened(name)!r} leaves the archive {self.path}")
        row = bisect.bisect_right(range(len(self._names)), str(path), key=lambda i: self._names[i].as_py()) - 1
        if row < 0 or self._names[row].as_py() != str(path):
            example = f", only such as {self._names[0].as_py()!r}" if len(self._names) else ""
            raise SampleError("image_missing", f"{self.path}: the archive holds no {shortened(name)!r}{example}")
        return ArchivedPicture(self.path, **self._index.slice(row, 1).to_pylist()[0])


@dataclass(frozen=True)
class ArchivedPicture:
    """One member of an archive. Fields as in the index."""

    archive: Path
    name: str
    offset: int
    n_stored: int
    n_bytes: int
    is_deflated: bool
    crc: int | None

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        if max(self.n_bytes, self.n_stored) > _LARGEST:
            raise SampleError("decompression_bomb", f"{self}: too large to read: {self.n_bytes:,} bytes")
        return BytesIO(self._content())

    def _content(self) -> bytes:
        offset = self.offset
        if self.crc is not None:
            magic, n_name, n_extra = _ZIP_HEADER.unpack(self._read(offset, _ZIP_HEADER.size))
            if magic != _ZIP_MAGIC:
                raise SampleError("image_damaged", f"{self}: the archive changed or is damaged")
            offset += _ZIP_HEADER.size + n_name + n_extra
        content = self._read(offset, self.n_stored)
        try:
            if self.is_deflated:
                content = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(content, self.n_bytes + 1)
        except zlib.error as error:
            raise SampleError("image_damaged", f"{self}: cannot be decompressed: {error}") from error
        if len(content) != self.n_bytes or self.crc not in (None, zlib.crc32(content)):
            raise SampleError("image_damaged", f"{self}: the content does not have the checksum of the archive")
        return content

    def __str__(self) -> str:
        return f"{self.archive}:{shortened(self.name)}"

    def _read(self, offset: int, n_bytes: int) -> bytes:
        content = os.pread(_descriptor(self.archive), n_bytes, offset)
        if len(content) < n_bytes:
            raise SampleError("image_truncated", f"{self}: the archive ends within the picture")
        return content


@lru_cache(maxsize=16)
def _descriptor(path: Path) -> int:
    """An open file. `os.pread` moves no position, so that forked processes may share it."""
    return os.open(path, os.O_RDONLY)


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, EOFError):
        return False


def _zip_contents(path: Path) -> Iterator[tuple]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{path}: {member.filename} is encrypted or compressed unusually; pack it with plain zip"
                )
            is_deflated = member.compress_type == zipfile.ZIP_DEFLATED
            name = str(PurePosixPath(member.filename))
            yield name, member.header_offset, member.compress_size, member.file_size, is_deflated, member.CRC


def _tar_contents(path: Path) -> Iterator[tuple]:
    with tarfile.open(path, "r:") as archive:
        places: dict[str, tuple[int, int]] = {}  # of members that hard links may name
        for member in archive:
            if member.isfile() and not member.sparse:
                places[member.name] = member.offset_data, member.size
            place = places.get(member.linkname if member.islnk() else member.name)
            if place is not None:
                name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                yield str(PurePosixPath(name)), place[0], place[1], place[1], False, None
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
