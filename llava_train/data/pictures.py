"""Where the pictures of a source are: in folders, in ZIP or TAR archives read in place, or in the record itself.

A store turns what a record says of an image into a `Picture`, without touching the file; `open` does that, in
the process that decodes it. Nothing outside the declared roots is read: a path that leaves its root is refused, and
so is a symbolic link, unless the folder that it leads to is declared too.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

import pyarrow as pa

from llava_train.data.problems import SampleError


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
        return self.name


@dataclass(frozen=True)
class PictureFile:
    """A file that must really lie in one of the declared roots."""

    path: Path
    roots: tuple[Path, ...]

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        try:
            real = self.path.resolve()
        except RuntimeError as error:  # before Python 3.13
            raise SampleError("image_unreadable", f"{self.path}: a symbolic link to itself") from error
        if not any(real.is_relative_to(root.resolve()) for root in self.roots):
            raise SampleError(
                "symlink_outside_root",
                f"{self.path} is a link to {real}, outside {self.roots[0]}; declare that folder in `images:` too",
            )
        return real.open(mode)

    def __str__(self) -> str:
        return str(self.path)


class PictureFolder:
    """Pictures below a folder.

    Args:
        others: declared roots that symbolic links may lead to.
    """

    def __init__(self, root: Path, others: Iterable[Path] = ()) -> None:
        self.root, self.others = root, tuple(others)

    def find(self, name: str) -> Picture:
        path = Path(name)
        if path.is_absolute():
            path = next((path.relative_to(r) for r in self._roots() if path.is_relative_to(r)), path)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise _outside(name, f"the image folder {self.root}")
        return PictureFile(self.root / path, (self.root, *self.others))

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
            "image_missing", f"image path {name!r} begins with none of the prefixes of `images:`: {known}"
        )


class Pictures:
    """What a record says of an image -> a Picture."""

    def __init__(self, store: PictureStore) -> None:
        self.store = store

    def picture(self, value: Any) -> Picture:
        """The picture of a path, of bytes, or of `{"bytes", "path"}` as Hugging Face datasets have it.

        Raises:
            SampleError: a path outside the root, an address on the network, or something else.
        """
        content, name = value, None
        if isinstance(value, dict):
            content, name = value.get("bytes"), value.get("path")
            content = name if content is None else content
        if isinstance(content, bytes | pa.Buffer):
            return EmbeddedPicture(content, name or "embedded picture")
        if not isinstance(content, str) or not content:
            raise SampleError("image_value", f'"image" is a path, bytes or a list of them, not {value!r:.60}')
        if content.startswith("data:"):
            return EmbeddedPicture(data_url_content(content), "embedded picture")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise SampleError("not_utf8", f"image path {content!r} holds half of a character (a lone UTF-16 surrogate)")
        if content.startswith(("http://", "https://")):
            raise SampleError("image_remote", f"image {content:.100} is on the network; download it first")
        return self.store.find(content)


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
    return SampleError("path_outside_root", f"image path {name!r} leaves {root}")
