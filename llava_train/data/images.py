"""Image file -> the pixels that the encoder sees."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, features
from transformers.image_processing_utils import BaseImageProcessor

from llava_train.data.paths import unencodable
from llava_train.data.pictures import Picture
from llava_train.data.problems import SampleError
from llava_train.data.rgb import as_rgb
from llava_train.git_lfs import LFS_ADVICE, is_lfs_pointer

HAS_AVIF = "avif" in features.modules and bool(features.check("avif"))
"""Whether this Pillow reads AVIF: from 11.3 on, unless it was built without."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if HAS_AVIF else ()))
"""What may be opened. Pillow knows formats that start other programs (EPS starts Ghostscript)."""

_LONGEST_SIDE = 4096
"""Pixels that an extremely long picture is shrunk to before it is padded."""

DAMAGED = (OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError, LookupError, RuntimeError)
"""What Pillow raises on damaged pictures."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation tag."""


def decode_image(picture: Picture) -> Image.Image:
    """Reads a picture as RGB, turned as its EXIF tag says; of an animation the first frame.

    16 bits are scaled to 8, a palette becomes its colours, CMYK is converted, transparent parts are laid on white.

    Raises:
        SampleError: missing, empty, not a picture, truncated, of numbers whose range is not known, or so large that it
            may be a decompression bomb.
    """
    with open_image(picture) as image:
        return decoded(image, picture)


def decoded(image: Image.Image, picture: Picture) -> Image.Image:
    """The pixels of a picture whose header was read, as `decode_image` gives them. Raises SampleError."""
    with _problems_of(picture):
        _refuse_unusable(image, picture)
        return _upright(as_rgb(image), image.getexif().get(ExifTags.Base.Orientation))


def stored_bytes(picture: Picture) -> bytes:
    """A picture as it is stored, not decoded. Raises SampleError where it cannot be read."""
    with _problems_of(picture), picture.open("rb") as file:
        return file.read()


@contextmanager
def open_image(picture: Picture) -> Iterator[Image.Image]:
    """The header of a picture, its pixels not decoded yet. Raises SampleError."""
    with _problems_of(picture):
        file = picture.open("rb")
    with file:
        with _problems_of(picture):
            head = file.read(64)
            if not head:
                raise SampleError("image_empty", f"{picture}: the image file is empty (zero bytes)")
            if is_lfs_pointer(head):
                raise SampleError("not_an_image", f"{picture}: a Git LFS pointer, {LFS_ADVICE}")
            if (format_name := _unread_format(head)) is not None:
                raise SampleError("not_an_image", f"{picture}: {format_name}; save it as JPEG or PNG")
            file.seek(0)
            image = Image.open(file, formats=FORMATS)
            _refuse_unusable(image, picture)
        with image:
            yield image


def _unread_format(head: bytes) -> str | None:
    """Name a format of phones and the web that is not read here, by the first 12 bytes of a file."""
    if head[4:8] != b"ftyp":
        return None
    if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"):
        return "a HEIC picture, which Pillow cannot read"
    if head[8:12] in (b"avif", b"avis") and not HAS_AVIF:
        return "an AVIF picture, which needs Pillow 11.3 or later (pip install -U pillow)"
    return None


def _refuse_unusable(image: Image.Image, picture: Picture) -> None:
    """Raises SampleError for a picture that opens, but cannot be shown to a model."""
    if image.width == 0 or image.height == 0:
        raise SampleError("image_empty", f"{picture}: has no pixels ({image.width} x {image.height})")
    if image.mode in ("I", "F"):
        raise SampleError(
            "image_mode",
            f"{picture}: of mode {image.mode}: numbers of 32 bits, and nothing says which of them is white; "
            "scale it to 8 or 16 bits a channel",
        )


@contextmanager
def _problems_of(picture: Picture) -> Iterator[None]:
    """Turns what Pillow and the system raise into SampleErrors that name the picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # odd EXIF tags, odd transparency: nothing that a run loses
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except SampleError:
        raise
    except FileNotFoundError as error:
        raise SampleError("image_missing", f"{picture}: the image file is missing") from error
    except UnicodeEncodeError as error:
        reason = unencodable(error.object) or str(error)
        raise SampleError("image_unreadable", f"{picture}: cannot be opened: {reason}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("decompression_bomb", f"{picture}: too large to decode: {error}") from error
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise SampleError("not_an_image", f"{picture}: not a readable image: none of {formats}") from error
    except OSError as error:
        if error.errno is not None:
            raise SampleError("image_unreadable", f"{picture}: cannot be read: {error.strerror}") from error
        kind = "image_truncated" if "truncated" in str(error) else "image_damaged"
        raise SampleError(kind, f"{picture}: not a readable image: {error}") from error
    except DAMAGED as error:
        raise SampleError("image_damaged", f"{picture}: not a readable image: {error}") from error


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """A picture turned as its EXIF orientation says.

    `ImageOps.exif_transpose` also writes the other EXIF tags anew, and fails on those that a camera wrote wrong.
    """
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


class ImagePreprocessor:
    """Pictures -> pixel values, by the image processor that the exported model carries."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self.size: int = (processor.crop_size or processor.size)["height"]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pixel values of an RGB picture: float32 [3, size, size]."""
        pixels = np.asarray(self._within_bounds(image))
        return self.processor(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]

    def denormalized(self, pixels: torch.Tensor) -> Image.Image:
        """The picture of pixel values [3, H, W]: what the encoder sees, to look at."""
        processor = self.processor
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
        values = ((pixels * deviation + mean) / processor.rescale_factor).round().clamp(0, 255)
        return Image.fromarray(values.permute(1, 2, 0).to(torch.uint8).numpy())

    def _within_bounds(self, image: Image.Image) -> Image.Image:
        """A picture that the processor can handle: one of 1 x 20,000 would become a square of gigabytes.

        Only where the processor would make more pixels than a picture may have is a picture shrunk before it is
        padded, or its ends are cut off before it is cropped.
        """
        short, long = sorted(image.size)
        limit = Image.MAX_IMAGE_PIXELS or 0
        if self.processor.do_pad and long**2 > limit:
            scale = _LONGEST_SIDE / long
            return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        if self.processor.do_center_crop and self.size**2 * long / short > limit:
            width, height = (min(side, 16 * short) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        return image

    def blank(self) -> torch.Tensor:
        """Pixels for a picture that is not there: float32 zeros [3, size, size], the encoder's mean colour."""
        return torch.zeros(3, self.size, self.size)
