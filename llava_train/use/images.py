"""What a user gives as a picture -> the decoded picture, by the rules of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, TypeAlias

from PIL import Image

from llava_train.data.images import decode_image, decoded
from llava_train.data.pictures import LONGEST_PATH, EmbeddedPicture, base64_content, data_url_content, is_base64_picture
from llava_train.data.problems import shortened
from llava_train.errors import UserError
from llava_train.use.fetch import fetch, is_url
from llava_train.user_paths import expand

ImageLike: TypeAlias = str | Path | bytes | IO[bytes] | Image.Image
"""A picture: a path, an open file, its bytes, a decoded picture, a data: URL, or (where allowed) an http(s) address."""


def read_image(image: ImageLike, allow_urls: bool = False) -> Image.Image:
    """A picture as RGB, upright.

    Raises:
        SampleError: not a readable picture, or so large that it may be a decompression bomb.
        FetchError: an address that cannot or must not be fetched.
        UserError: an address without `allow_urls`, or something else than a picture.
    """
    if isinstance(image, Image.Image):
        return decoded(image, EmbeddedPicture(b"", "the picture"))
    if isinstance(image, bytes):
        return decode_image(EmbeddedPicture(image, "the picture"))
    if isinstance(image, str) and is_url(image):
        if not allow_urls:
            raise UserError(f"{image:.200}: addresses are not fetched unless allowed (allow_urls=True, --allow-urls)")
        return decode_image(EmbeddedPicture(fetch(image), f"{image:.200}"))
    if isinstance(image, str) and re.match(r"(?!data:)\w{2,}://", image):
        raise UserError(f"{image:.200}: only http(s) addresses are fetched; a file is named by its path")
    if not isinstance(image, str | Path) and hasattr(image, "read"):
        return decode_image(EmbeddedPicture(_content(image), "the picture"))
    if isinstance(image, str) and image.startswith("data:"):
        return decode_image(EmbeddedPicture(data_url_content(image), "the picture"))
    if isinstance(image, str) and is_base64_picture(image):
        return decode_image(EmbeddedPicture(base64_content(image), "the picture"))
    if isinstance(image, str | Path):
        if len(str(image)) > LONGEST_PATH:
            raise UserError(f"picture {shortened(str(image))!r}: too long for the path of a file")
        return decode_image(Path(expand(str(image))))
    raise UserError(f"a picture is a path, bytes, a PIL image or an address, not {type(image).__name__}")


def _content(file: IO[bytes]) -> bytes:
    """Bytes of an open file. Raises UserError where it gives text."""
    try:
        if isinstance(content := file.read(), bytes):
            return content
    except UnicodeDecodeError:
        pass
    raise UserError("the picture's file is open in text mode; open it with mode 'rb'")
