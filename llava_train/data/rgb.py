"""Any picture that Pillow knows -> 8-bit RGB. Imports no torch, so that the report can use it."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_WITH_COLOUR_KEY = ("1", "L", "P", "RGB")
"""Modes of which one colour may be transparent, besides 16-bit gray (`I;16` and its byte orders)."""

_KEY_FACTORS = {"L;2": 85, "L;4": 17}
"""Pillow 12.3 widens gray of 2 and 4 bits to 8, but leaves the transparent gray as the PNG states it."""


def has_transparency(image: Image.Image) -> bool:
    """Return whether a picture has an alpha channel or a transparent colour; every pixel may be opaque all the same."""
    if image.mode in _WITH_ALPHA:
        return True
    return image.has_transparency_data and (image.mode in _WITH_COLOUR_KEY or image.mode.startswith("I;16"))


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as RGB: 16 bits scaled to 8, transparent parts laid on white. The picture itself is unchanged.

    The colours under transparent pixels are arbitrary, so they must not be shown. White is the ground that vLLM and
    transformers 5.23 take, and the result equals theirs in every bit.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bits(image)).convert("RGB")
    if not has_transparency(image):
        return image.convert("RGB")
    key = _transparency_in_8_bits(image)  # before the picture is loaded, which loses how it was stored
    image = image.copy()
    if key is not None:
        image.info["transparency"] = key
    if image.mode == "La":  # Pillow has no way from here to RGBA but this
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_16_bits(image: Image.Image) -> np.ndarray:
    """Gray of 16 bits as uint8 [H, W]; Pillow's own conversion would cut values off at 255."""
    levels, n_bits, is_negative = np.asarray(image), 16, False
    if isinstance(image, TiffImageFile):  # Pillow 12.3 leaves 12 bits unscaled, and negatives of 16 bits negative
        n_bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
        is_negative = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    gray = (levels >> (n_bits - 8)).astype(np.uint8)
    if is_negative:
        gray = 255 - gray
    if (key := image.info.get("transparency")) is not None:
        gray[levels == key] = 255
    return gray


def _transparency_in_8_bits(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """What `info` says of transparency, in the 8 bits that Pillow gives to pixels."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    stored_as = tiles[0][3] if tiles and image.format == "PNG" else image.mode
    if isinstance(key, bytes):
        return key[:256]  # Pillow refuses more alphas than a palette can have colours
    if isinstance(key, tuple) and stored_as == "RGB;16B":  # its pixels are the upper bytes
        return tuple(level >> 8 for level in key)
    if isinstance(key, int):
        return key * _KEY_FACTORS.get(stored_as, 1)
    return key
