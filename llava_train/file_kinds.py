"""What a file is, by its first bytes, for messages about a file that was expected to be another one. Needs no torch."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

N_LOOKED_AT = 1 << 16
"""Bytes of a file."""
_DELIMITERS = ",\t;|"
_STAGE_KEYS = {"name", "model", "trainable", "data"}
_FIRST_KEY = re.compile(r"(\s|#.*\n|---\s)*\w+:")
"""At the start of a mapping in YAML; a page about stage files begins otherwise."""

_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "a PNG picture"),
    (b"\xff\xd8\xff", 0, "a JPEG picture"),
    (b"GIF8", 0, "a GIF picture"),
    (b"WEBP", 8, "a WebP picture"),
    (b"II*\x00", 0, "a TIFF picture"),
    (b"MM\x00*", 0, "a TIFF picture"),
    (b"ftypavif", 4, "an AVIF picture"),
    (b"ftyphei", 4, "a HEIC picture"),
    (b"ftyp", 4, "a video"),
    (b"PAR1", 0, "a Parquet file"),
    (b"ARROW1", 0, "an Arrow file"),
    (b"\xff\xff\xff\xff", 0, "an Arrow file"),
    (b"Obj\x01", 0, "an Avro file"),
    (b"GGUF", 0, "a GGUF model of llama.cpp"),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file"),
    (b"SQLite format 3\x00", 0, "an SQLite database"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"%PDF-", 0, "a PDF"),
    (b"\x1f\x8b", 0, "a gzip file"),
    (b"1AY&SY", 4, "a bzip2 file"),
    (b"\xfd7zXZ\x00", 0, "an xz file"),
    (b"\x28\xb5\x2f\xfd", 0, "a Zstandard file"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7-Zip archive"),
    (b"Rar!", 0, "a RAR archive"),
    (b"ustar", 257, "a TAR archive"),
    (b"version https://git-lfs.github.com/spec/", 0, "a Git LFS pointer, whose content was not downloaded"),
)


@dataclass(frozen=True)
class FileKind:
    """What a file is."""

    words: str
    """With its article: "a PNG picture"."""
    delimiter: str = ""
    """Of a table in text (CSV)."""

    @property
    def is_picture(self) -> bool:
        return self.words.endswith(" picture")


def kind_of_file(path: Path) -> FileKind | None:
    """Return what a file is, or None where its content is not known. Raises OSError."""
    with path.open("rb") as file:
        return kind_of_content(file.read(N_LOOKED_AT), path)


def kind_of_content(head: bytes, path: Path) -> FileKind | None:
    """Return what a file is by its first `N_LOOKED_AT` bytes; `path` is opened only where they are a ZIP archive's."""
    if not head.strip(b"\x00 \t\r\n\xef\xbb\xbf"):
        return FileKind("an empty file" if not head else "a file of blanks")
    for magic, offset, words in _MAGIC:
        if head.startswith(magic, offset):
            return FileKind(words)
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return FileKind("a BMP picture")
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head.startswith(b"\x80") or is_safetensors(head):
        return FileKind("a safetensors file" if is_safetensors(head) else "a pickle")
    return _kind_of_text(path, head)


def in_utf_8(encoding: str) -> str:
    """Return how to bring a text to UTF-8; `encoding` as `json.detect_encoding` names it, such as `utf-16-le`."""
    name = re.sub("-([BL]E)", r"\1", encoding.upper())
    return (
        f"text in {name[:6]}, not in UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW (in PowerShell it is "
        "`Out-File -Encoding utf8` that writes UTF-8)"
    )


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header in eight bytes, then the header."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 30


def _kind_of_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return FileKind("a damaged ZIP archive")
    if any(name.endswith("data.pkl") for name in names):
        return FileKind("a file of PyTorch")
    if "[Content_Types].xml" in names:
        return FileKind("an Excel file" if any(name.startswith("xl/") for name in names) else "an Office file")
    if names and all(name.endswith(".npy") for name in names):
        return FileKind("NumPy arrays")
    return FileKind("a ZIP archive")


def _kind_of_text(path: Path, head: bytes) -> FileKind | None:
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = head.decode("utf-16" if wide else "utf-8-sig", "strict" if len(head) < N_LOOKED_AT else "ignore")
    except UnicodeDecodeError:
        text = head.decode("latin-1")
        if "\x00" in text:
            return None
    if "\x00" in text or sum(not c.isprintable() and c not in "\r\n\t\f" for c in text) > len(text) // 20:
        return None
    start, encoded = text.lstrip(), " in UTF-16" if wide else ""
    if not start:
        return None
    if re.match(r"<!doctype html|<html", start, re.IGNORECASE):
        return FileKind("an HTML page, as a failed download leaves one")
    if start.startswith("<"):
        return FileKind("an XML file" + encoded)
    if _is_stage_file(start):
        return FileKind("a stage file")
    if start[0] in "[{" or _is_json(start):
        return FileKind("a JSON file" + encoded)
    is_table = path.suffix in (".csv", ".tsv")
    if not is_table and (path.suffix in (".yaml", ".yml") or re.match(r"---|-\s+\S|[\w.-]+:(\s|$)", start)):
        return FileKind("a YAML file" + encoded)
    if delimiter := _delimiter_of(path, text):
        return FileKind(("a TSV table" if delimiter == "\t" else "a CSV table") + encoded, delimiter)
    return FileKind("a text" + encoded)


def _is_json(text: str) -> bool:
    """Whether a text is one JSON value that is neither a list nor an object."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_stage_file(text: str) -> bool:
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    return _FIRST_KEY.match(text) is not None and len(_STAGE_KEYS.intersection(keys)) >= 3


def _delimiter_of(path: Path, text: str) -> str:
    """Return what separates the columns of a table in text; empty where it is none."""
    whole_lines = text[: text.rfind("\n") + 1] or text
    for delimiter in _DELIMITERS:
        try:
            rows = [row for row in csv.reader(StringIO(whole_lines), delimiter=delimiter) if row]
        except csv.Error:
            continue
        rows = rows[:-1] if len(rows) > 2 else rows  # the last may be cut off
        widths = {len(row) for row in rows}
        if len(widths) == 1 and widths.pop() > 1 and (len(rows) > 1 or path.suffix in (".csv", ".tsv")):
            return delimiter
    return {".csv": ",", ".tsv": "\t"}.get(path.suffix, "")
