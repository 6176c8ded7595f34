"""Where the pictures of a source are: in folders, in ZIP or TAR archives read in place, or in the record itself.

A store turns what a record says of an image into a `Picture`, without touching the file; `open` does that, in
the process that decodes it. Nothing outside the declared roots is read: a path that leaves its root is refused, and
so is a symbolic link, unless the folder that it leads to is declared too.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from llava_train.data.problems import SampleError, shortened

_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x0a")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}")
_TO_STANDARD = str.maketrans("-_", "+/")
"""From the base64 of URLs to the standard one."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://")
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_LIST_AS_TEXT = ("[]", '["', "['", '{"', "{'")
"""As tables in CSV hold lists."""
LONGEST_PATH = 4096
"""Characters of a path that Linux opens."""


class Picture(Protocol):
    """A picture that was not read yet; `str(picture)` names it."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """The encoded picture, as a file. Raises OSError or SampleError."""


class PictureStore(Protocol):
    """Pictures by name."""

    def find(self, name: str) -> Picture:
        """The picture of a relative path, or of an absolute one inside the root. Raises SampleError."""


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture whose bytes the record holds."""

    content: bytes | pa.Buffer = field(repr=False)
    """A buffer lies in a memory-mapped table and is read when the picture is."""
    name: str = "embedded picture"

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        return BytesIO(self.content)

    def __str__(self) -> str:
        return shortened(self.name)


@dataclass(frozen=True)
class PictureFile:
    """A file that must really lie in one of the declared roots."""

    path: Path
    roots: tuple[Path, ...]
    prefix: str | None = None
    """Of the root in `images:`, where that is a mapping."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        try:
            real = self.path.resolve()
        except RuntimeError as error:  # before Python 3.13
            raise SampleError("image_unreadable", f"{self.path}: a symbolic link to itself") from error
        if not self._is_inside(real):
            raise SampleError(
                "symlink_outside_root",
                f"{self.path} is a link to {real}, outside {self.roots[0]}; {self._mapping(real)}",
            )
        try:
            return real.open(mode)
        except FileNotFoundError as error:
            raise SampleError("image_missing", f"{self}: the image file is missing{self._other_spelling()}") from error

    def _mapping(self, real: Path) -> str:
        """Says how `images:` declares the folder that a link leads to, by the name of the link."""
        root = self.roots[0]
        places = [root.joinpath(*self.path.relative_to(root).parts[:n]) for n in range(1, len(self.path.parts))]
        link = next((place for place in places if place.is_symlink() and not self._is_inside(place.resolve())), None)
        if link is None or not link.is_dir():
            name, target = "linked", real.parent
        else:
            name, target = link.relative_to(root).as_posix(), link.resolve()
        if self.prefix is None:
            return f"write `images: {json.dumps({'': str(root), name: str(target)}, ensure_ascii=False)}`"
        name = "/".join(filter(None, (self.prefix.rstrip("/"), name)))
        return f"add `{json.dumps({name: str(target)}, ensure_ascii=False)[1:-1]}` to `images:`"

    def _is_inside(self, real: Path) -> bool:
        return any(real.is_relative_to(root.resolve()) for root in self.roots)

    def _other_spelling(self) -> str:
        """Says under which spelling of its path the file exists; empty where it does not."""
        for spelling, what in (
            (unquote(str(self.path)), "the path is percent-encoded"),
            (str(self.path).replace("\\", "/"), "folders are separated by /"),
        ):
            if spelling != str(self.path) and "\0" not in spelling and Path(spelling).is_file():
                return f"; {what}: write {shortened(spelling)!r}"
        return ""

    def __str__(self) -> str:
        return shortened(str(self.path))


class PictureFolder:
    """Pictures below a folder.

    Args:
        others: declared roots that symbolic links may lead to.
        prefix: of the folder in `images:`, where that is a mapping.
    """

    def __init__(self, root: Path, others: Iterable[Path] = (), prefix: str | None = None) -> None:
        self.root, self.others, self.prefix = root, tuple(others), prefix

    def find(self, name: str) -> Picture:
        path = Path(name)
        if path.is_absolute():
            path = next((path.relative_to(r) for r in self._roots() if path.is_relative_to(r)), path)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise _outside(name, f"the image folder {self.root}")
        return PictureFile(self.root / path, (self.root, *self.others), self.prefix)

    def _roots(self) -> tuple[Path, Path]:
        return self.root.absolute(), self.root.resolve()


class PrefixedStores:
    """Several stores, each for the names that begin with its prefix; the longest prefix decides.

    With `{"coco": store}` the picture `coco/train2017/1.jpg` is `train2017/1.jpg` of that store.
    """

    def __init__(self, stores: Mapping[str, PictureStore]) -> None:
        prefixes = {prefix.rstrip("/"): store for prefix, store in stores.items()}
        self._stores = sorted(prefixes.items(), key=lambda item: -len(item[0]))

    def find(self, name: str) -> Picture:
        for prefix, store in self._stores:
            if not prefix or PurePosixPath(name).is_relative_to(prefix):
                return store.find(str(PurePosixPath(name).relative_to(prefix)) if prefix else name)
        known = ", ".join(prefix for prefix, _ in self._stores)
        raise SampleError(
            "image_missing", f"image path {shortened(name)!r} begins with none of the prefixes of `images:`: {known}"
        )


class Pictures:
    """What a record says of an image -> a Picture."""

    def __init__(self, store: PictureStore) -> None:
        self.store = store

    def picture(self, value: Any) -> Picture:
        """The picture of a path, of bytes, of base64, or of `{"bytes", "path"}` as Hugging Face datasets have it.

        Raises:
            SampleError: a path outside the root, an address on the network, or something else.
        """
        content, name = content_and_name(value)
        if not isinstance(content, str):
            return EmbeddedPicture(content, name or "embedded picture")
        if content.startswith("data:"):
            return EmbeddedPicture(data_url_content(content))
        if is_base64_picture(content):
            return EmbeddedPicture(base64_content(content))
        _refuse_other_than_paths(content)
        return self.store.find(content)


def content_and_name(value: Any) -> tuple[str | bytes | pa.Buffer, str | None]:
    """Return the content of a value that stands for a picture, and the file name stated with it. Raises SampleError."""
    content, name = value, None
    if isinstance(value, dict):
        content, name = value.get("bytes"), value.get("path")
        is_nan = isinstance(content, float) and math.isnan(content)  # as pandas writes None
        if content is None or is_nan or (isinstance(content, str) and not content):
            content = name
    if isinstance(content, bytes | pa.Buffer):
        return content, name if isinstance(name, str) else None
    if not isinstance(content, str) or not content:
        raise SampleError("image_value", f'"image" is a path, bytes or a list of them, not {value!r:.60}')
    return content, None


def _refuse_other_than_paths(text: str) -> None:
    """Refuses addresses and what is no path of this system, and says what to write. Raises SampleError."""
    name = repr(shortened(text, 100))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SampleError("not_utf8", f"image path {name} holds half of a character (a lone UTF-16 surrogate)")
    if len(text) > LONGEST_PATH or "\n" in text:
        raise SampleError("image_value", f"image {name} is neither a path nor the base64 of a picture")
    if text.startswith(_LIST_AS_TEXT) and text.endswith(("]", "}")):
        raise SampleError("image_value", f"image {name} is a list or an object as a text; write the list itself")
    if scheme := _SCHEME.match(text):
        if scheme.group(1).lower() == "file":
            raise SampleError(
                "image_value", f"image {name} is an address; write the path: {unquote(urlsplit(text).path)!r:.200}"
            )
        raise SampleError("image_remote", f"image {name} is on the network; download it first, and write its path")
    if _WINDOWS_DRIVE.match(text):
        raise SampleError(
            "image_value", f"image {name} is a path of Windows; write it relative to the folder in `images:`, with /"
        )


def is_base64_picture(text: str) -> bool:
    """True if a text is the base64 of a picture, told by its first bytes. It may still be damaged further on."""
    if not _BASE64.fullmatch(text[:4096].rstrip("=\r\n ")):
        return False
    try:
        return is_picture_head(base64.b64decode("".join(text[:64].split())[:24].translate(_TO_STANDARD)))
    except binascii.Error:
        return False


def is_picture_head(head: bytes) -> bool:
    """True if bytes are the first ones of a picture in a common format."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    return head.startswith(_MAGIC) or is_webp or is_heif


def base64_content(text: str) -> bytes:
    """The bytes of a picture's base64, with or without line breaks and padding. Raises SampleError."""
    text = "".join(text.split()).rstrip("=").translate(_TO_STANDARD)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise SampleError(
            "image_value", f"image {shortened(text, 40)!r}: the base64 of a picture, but damaged: {error}"
        ) from error


def data_url_content(url: str) -> bytes:
    """The bytes of a base64 `data:` URL. Raises SampleError."""
    header, _, body = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise binascii.Error("only base64 is understood")
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise SampleError("image_value", f"image {header[:40]!r}: not a data URL with a picture: {error}") from error


def _outside(name: str, root: str) -> SampleError:
    return SampleError("path_outside_root", f"image path {shortened(name)!r} leaves {root}")
