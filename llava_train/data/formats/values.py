"""What a value of a record is: missing, the name or the bytes of a picture, of a video or of a sound."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from llava_train.data.pictures import is_base64_picture, is_picture_head

_PICTURE_SUFFIX = (
    r"jpe?g|jpe|jfif|a?png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|j2k|jxl|svg|p[bgnp]m|tga|ico|psd|exr|hdr|dng|cr2|nef|dcm"
)
_MEDIA_SUFFIX = (
    r"mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|f4v|3gp|ogv|m2ts|mts|vob|rmvb|asf|gifv|"
    r"wav|mp3|flac|ogg|oga|opus|m4a|aac|wma|aiff?|amr|midi?|caf|weba"
)
_PICTURE_NAME = re.compile(rf"[^\n]{{0,1000}}\.({_PICTURE_SUFFIX})([?#]\S*)?\s*", re.IGNORECASE)
_MEDIA_NAME = re.compile(rf"[^\n]{{0,1000}}\.({_MEDIA_SUFFIX})([?#]\S*)?\s*", re.IGNORECASE)


_PICTURE_WORDS = {"image", "img", "pic", "picture", "photo", "photograph", "screenshot", "pixel"}
_MEDIA_WORDS = {"video", "movie", "audio", "sound"}
_NAMING_WORDS = ("path", "file", "filename", "name", "url", "uri", "src", "data", "id", "bytes", "base64", "list")
_DESCRIBING_WORDS = {
    "size", "width", "height", "resolution", "shape", "ratio", "aspect", "area", "caption", "description", "title",
    "text", "ocr", "transcript", "language", "token", "count", "num", "number", "n", "has", "is", "with", "without",
    "format", "type", "mode", "kind", "encoding", "license", "source", "origin", "credit", "author", "tag", "label",
    "class", "category", "hash", "md5", "sha1", "sha256", "quality", "score", "rating", "min", "max", "mean",
    "correspondence", "dependency", "embedding", "feature", "date", "time", "duration", "fps", "frame", "start",
    "end", "index", "position", "box", "bbox", "mask", "meta", "metadata", "info", "processor", "model", "tower",
    "placeholder", "column",
}  # fmt: skip
"""Words of keys such as `image_size`, which describe a picture and do not name one."""


def is_missing(value: Any) -> bool:
    """True for None, NaN, a blank text, and for lists and objects that hold nothing else.

    Tables write a value that is not there in all these ways: Arrow gives each row the keys of all, pandas writes NaN.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, dict):
        return all(map(is_missing, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    return value is None


def as_rows(value: Any) -> Any:
    """A list of objects that `datasets` keeps as columns, `{"from": [...], "value": [...]}`; other values unchanged."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def picture_values(value: Any) -> Iterator[str | bytes]:
    """Yields what in a value names a picture by its file name, or is one in bytes, base64 or a `data:` URL.

    Bytes and encoded pictures are yielded as bytes (their first ones only).
    """
    if isinstance(value, str):
        if value.startswith("data:image/") or is_base64_picture(value):
            yield b"encoded"
        elif _PICTURE_NAME.fullmatch(value):
            yield value.strip()
    elif isinstance(value, bytes | bytearray | pa.Buffer):
        head = bytes(memoryview(value)[:16])
        if is_picture_head(head):
            yield head
    elif isinstance(value, dict) and not is_missing(value.get("bytes")):
        yield from picture_values(value["bytes"])
    else:
        for inner in _inner_values(value):
            yield from picture_values(inner)


def names_media(value: Any) -> bool:
    """True if a value names a video or a sound by its file name, or is one in bytes or a `data:` URL."""
    if isinstance(value, str):
        return bool(_MEDIA_NAME.fullmatch(value)) or value.startswith(("data:video/", "data:audio/"))
    if isinstance(value, bytes | bytearray | pa.Buffer):
        return _is_media_head(bytes(memoryview(value)[:16]))
    return any(map(names_media, _inner_values(value)))


def _is_media_head(head: bytes) -> bool:
    """True if bytes are the first ones of a video or a sound in a common format."""
    is_riff = head[:4] == b"RIFF" and head[8:12] in (b"WAVE", b"AVI ")
    is_mp4 = head[4:8] == b"ftyp" and not is_picture_head(head)
    return is_riff or is_mp4 or head.startswith((b"ID3", b"fLaC", b"OggS", b"\x1aE\xdf\xa3"))


def is_picture_key(key: str, value: Any) -> bool:
    """True if a key is a spelling of `image` (`img`, `Image`, `image_file`, ...), and the value may name a picture."""
    return _names_by_key(key, value, _PICTURE_WORDS, may_be_misspelt=True)


def is_media_key(key: str, value: Any) -> bool:
    """True if a key is a spelling of `video` or `audio`, and the value may name one."""
    return _names_by_key(key, value, _MEDIA_WORDS)


def _inner_values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def _names_by_key(key: str, value: Any, words: set[str], may_be_misspelt: bool = False) -> bool:
    parts = words_of(key)
    found = [part for part in parts if _is_of(part, words)]
    if not found and may_be_misspelt and len(parts) == 1 and isinstance(value, str):
        found = difflib.get_close_matches(parts[0], ("image", "images", "picture", "photo"), n=1, cutoff=0.8)
    if not found or any(part in _DESCRIBING_WORDS or part.rstrip("s") in _DESCRIBING_WORDS for part in parts):
        return False
    if isinstance(value, bool) or is_missing(value):
        return False
    return not isinstance(value, int | float) or parts[-1] in ("id", "ids") or _is_of(parts[-1], words)


def _is_of(part: str, words: set[str]) -> bool:
    """True for a word, its plural, and compounds such as `imagepath`."""
    return any(
        part.startswith(word)
        and part[len(word) :] in ("", "s", *_NAMING_WORDS, *(f"s{name}" for name in _NAMING_WORDS))
        for word in words
    )


@lru_cache(maxsize=1024)
def words_of(key: str) -> tuple[str, ...]:
    """The words of a key in lower case: `imagePath`, `image_path` and `Image-Path` are `image`, `path`."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key)
    return tuple(word.lower() for word in words if not word.isdigit())
