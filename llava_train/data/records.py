"""The records of JSON and JSONL files, plain or gzipped, by index.

A file is cut into its records once; the records, as JSON text, are kept in a memory-mapped table and parsed when a
step asks for them. So opening a file again takes no pass over it, its size takes no memory of a process, and
a record that is no JSON or no UTF-8 spoils itself alone.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8, getincrementaldecoder
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from llava_train.data.built_once import built_once
from llava_train.data.other_formats import not_records
from llava_train.data.problems import DataError, SampleError, shortened
from llava_train.file_kinds import N_LOOKED_AT, in_utf_8
from llava_train.files import sha256
from llava_train.git_lfs import LFS_ADVICE, is_lfs_pointer

GZIP_MAGIC = b"\x1f\x8b"
_SCHEMA = pa.schema({"record": pa.large_binary(), "line": pa.int64()})
_VERSION = 1
_CHUNK = 4 << 20
_FIRST_KEY = re.compile(rb'\{\s*"([^"\n]*)"\s*:')
_BLANK = " \t\r\n"
_N_SHOWN = 30
"""Characters that are shown of both sides of an error."""
_LONGEST_TAIL = 32
"""Characters by which a number or an escape that the end of a window cuts off may go on."""


class JsonRecords:
    """The records of a JSON list, or of a file with one JSON object a line, told by the first character.

    Args:
        path: the file.
        cache: folder for the memory-mapped records; None keeps them in memory.

    Raises:
        DataError: the file is missing, empty, or neither of the two.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path, self.cache = path, cache
        table = built_once("records", path, cache, _SCHEMA, lambda: _cut(path), _VERSION)
        self._records, self._lines = table["record"], table["line"]
        if not len(self):
            raise DataError(f"{path}: holds no sample")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        """The parsed record. Raises SampleError."""
        content = self._records[index].as_py()
        try:
            return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeated_keys)
        except SampleError:
            raise
        except UnicodeDecodeError as error:
            raise SampleError("not_utf8", f"not UTF-8: {error.reason} at byte {error.start} of the record") from error
        except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads
            raise SampleError("not_json", f"not valid JSON: {error}") from error

    def line(self, index: int) -> int:
        """The line, counted from 1, that the record begins in."""
        return cast(int, self._lines[index].as_py())

    def text(self, index: int) -> str:
        """The record as it stands in the file."""
        return cast(bytes, self._records[index].as_py()).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """The file's sha256, computed once."""
        schema = pa.schema({"sha256": pa.string()})
        table = built_once("sha256", self.path, self.cache, schema, lambda: [(sha256(self.path),)], _VERSION)
        return cast(str, table["sha256"][0].as_py())


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of keys and values; JSON would let a later value replace an earlier one. Raises SampleError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next((key for key, value in pairs if found[key] != value), None)
        if repeated is not None:
            raise SampleError(
                "not_json", f'the key "{shortened(repeated, 60)}" stands twice in an object, with different values'
            )
    return found


def _cut(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields each record and its line."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            yield from _cut_text(cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the data file: {error.strerror}") from error


def _cut_text(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    _refuse_other_text(file, path)
    first = _first_character(file)
    if first == b"[":
        yield from _cut_list(file, path)
    elif first == b"{":
        yield from _cut_lines(file, path)
    elif first:
        raise DataError(not_records(path, file.read(N_LOOKED_AT)))


def _refuse_other_text(file: BinaryIO, path: Path) -> None:
    """Refuses Git LFS pointers, and text in UTF-32 or in UTF-16 without a byte order mark. Raises DataError.

    Text in UTF-16 with a mark is left to `not_records`, which says what the text is. The file is left where it began.
    """
    head = file.read(64)
    file.seek(0)
    if is_lfs_pointer(head):
        raise DataError(f"{path}: a Git LFS pointer, {LFS_ADVICE}")
    encoding = json.detect_encoding(head)  # by the byte order mark, or where zeros stand
    if encoding.startswith("utf-8") or encoding == "utf-16":
        return
    if encoding == "utf-32" or head.decode(encoding, "replace").lstrip()[:1] in ("[", "{"):
        raise DataError(f"{path}: {in_utf_8(encoding)}")


def _first_character(file: BinaryIO) -> bytes:
    """The first byte of the content; the file is left where it began."""
    head = file.read(1 << 16).removeprefix(BOM_UTF8).lstrip()
    file.seek(0)
    return head[:1]


def _cut_lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    """The lines of JSONL. A later line that is no JSON is a bad sample; in the first one it is another format."""
    for number, line in enumerate(file, start=1):
        record = (line.removeprefix(BOM_UTF8) if number == 1 else line).strip()
        if not record:
            continue
        if number == 1:
            _check_first_line(record, path, file)
        yield record, number


def _check_first_line(record: bytes, path: Path, rest: Iterable[bytes]) -> None:
    """Refuses a first line that is no JSON. Raises DataError.

    Args:
        rest: the lines that follow it.
    """
    try:
        json.loads(record)
    except UnicodeDecodeError:
        pass
    except ValueError as error:
        following = list(islice(rest, 20))
        beginning = record + b"".join(following)
        is_jsonl = any(map(_is_object, following))
        if not is_jsonl and b"\n" in beginning and (key := _FIRST_KEY.match(beginning)):
            name = shortened(key.group(1).decode("utf-8", "replace"), 40)
            raise DataError(
                f'{path}: one JSON object over several lines, whose first key is "{name}"; wanted a JSON list of '
                f'records, or JSONL with one JSON object a line. If the records are under "{name}", save that list'
            ) from error
        raise DataError(
            f"{path}: line 1 is not valid JSON: {error}; wanted a JSON list of records, or JSONL with one JSON "
            "object a line"
        ) from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _cut_list(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    """The elements of a JSON list, read in chunks: each is scanned by Python's decoder, and its text is kept."""
    text = _Text(file, path)
    text.skip("[")
    if text.peek() == "]":
        text.skip("]")
    else:
        while True:
            yield text.element()
            if text.peek() == "]":
                text.skip("]")
                break
            text.skip(",")
    if text.peek():
        raise text.error("something follows the end of the list", is_in_record=False)


class _Text:
    """A window on the text of a JSON file. Bytes that are not UTF-8 stay as surrogates."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decode = getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._scan = json.JSONDecoder(parse_int=len, parse_float=len).raw_decode  # no number is made of its digits
        self._window, self._position, self._at_end = "", 0, False
        self._line, self._line_start, self._counted = 1, 0, 0
        """The line of character `_counted` of the window, and where it begins; negative before the window."""
        self._n_records, self._last_record = 0, b""

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            window = self._window
            while self._position < len(window) and window[self._position] in _BLANK:
                self._position += 1
            if self._position < len(window) or self._at_end:
                return window[self._position : self._position + 1]
            self._read_on()

    def skip(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            problem = f"wanted {expected!r}, found {found!r}" if found else "the list has no end, as in a cut-off copy"
            raise self.error(problem, is_in_record=False)
        self._position += 1

    def element(self) -> tuple[bytes, int]:
        """The bytes of the next JSON value, and its line."""
        self.peek()
        while True:
            try:
                _, end = self._scan(self._window, self._position)
                if end + _LONGEST_TAIL < len(self._window) or self._at_end:  # else a number might go on
                    break
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TAIL > len(self._window)
                if self._at_end or not cut_off:
                    raise self.error(error.msg, position=error.pos) from error
            self._read_on()
        record, line = self._window[self._position : end], self._line_at(self._position)
        self._position = end
        self._n_records, self._last_record = self._n_records + 1, record.encode("utf-8", "surrogateescape")
        return self._last_record, line

    def error(self, what: str, *, position: int | None = None, is_in_record: bool = True) -> DataError:
        """The error at a position of the window: lines do not tell a place in a file of one line, so records do."""
        position = self._position if position is None else position
        line = self._line_at(position)
        records = [f"in record {self._n_records + 1:,}"] if is_in_record else []
        if self._n_records:
            records.append(f"after record {self._n_records:,}{_id_in_words(self._last_record)}")
        place = ", ".join([f"line {line}", f"column {position - self._line_start + 1:,}", *records])
        near = self._window[max(0, position - _N_SHOWN) : position + _N_SHOWN]
        return DataError(
            f"{self._path}: not valid JSON: {what} ({place}), at {near!r}; fix it, or keep the file as JSONL, where a "
            "broken line spoils no other"
        )

    def _line_at(self, position: int) -> int:
        n_ends = self._window.count("\n", self._counted, position)
        if n_ends:
            self._line_start = self._window.rindex("\n", self._counted, position) + 1
        self._line, self._counted = self._line + n_ends, position
        return self._line

    def _read_on(self) -> None:
        """Moves the window on by a chunk, or by its own length where a record is long."""
        self._line_at(self._position)
        rest = self._window[self._position :]
        self._line_start -= self._position
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._at_end = not chunk
        self._window, self._position, self._counted = rest + self._decode(chunk, self._at_end), 0, 0


def _id_in_words(record: bytes) -> str:
    """` with the id 'a'`; empty where a record has none."""
    try:
        stated = json.loads(record).get("id")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return "" if stated is None else f" with the id {str(stated)!r:.100}"
