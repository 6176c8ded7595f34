"""Image file -> the pixels that the encoder sees."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.image_processing_utils import BaseImageProcessor

from llava_train.data.samples import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What may be opened. Pillow knows formats that start other programs (EPS starts Ghostscript)."""

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


def decode_image(path: Path) -> Image.Image:
    """Reads a picture as RGB, turned as its EXIF tag says; of an animation the first frame.

    Raises:
        SampleError: missing, not a picture, truncated, or so large that it may be a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _upright(_as_rgb(image), image.getexif().get(ExifTags.Base.Orientation))
    except FileNotFoundError as error:
        raise SampleError(f"{path}: the image file is missing") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise SampleError(f"{path}: not a readable image: {error}") from error


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    """A picture turned as its EXIF orientation says.

    `ImageOps.exif_transpose` also writes the other EXIF tags anew, and fails on those that a camera wrote wrong.
    """
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class ImagePreprocessor:
    """Pictures -> pixel values, by the image processor that the exported model carries."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor
        self.size: int = processor.crop_size["height"]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pixel values of an RGB picture: float32 [3, size, size]."""
        return self.processor(np.asarray(image), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ][0]

    def blank(self) -> torch.Tensor:
        """Pixels for a picture that is not there: float32 zeros [3, size, size], the encoder's mean colour."""
        return torch.zeros(3, self.size, self.size)
