"""Pictures of every kind as RGB: the colours that a viewer shows on a white page."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_train.data.images import decode_image, decoded
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.rgb import as_rgb, has_transparency

WHITE = (255, 255, 255)


def png(n_bits: int, colour_type: int, row: bytes, width: int, transparent: bytes, palette: bytes = b"") -> bytes:
    """A PNG of one row, with a tRNS chunk: Pillow writes only some of these."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, n_bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", palette) if palette else b"", chunk(b"tRNS", transparent)]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


def tiff(n_bits: int, photometric: int, row: bytes, width: int) -> bytes:
    """A gray TIFF of one row; `photometric` 0 is a negative, 1 is not."""
    row += bytes(len(row) % 2)
    tags = [(256, width), (257, 1), (258, n_bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(row))]
    content = b"".join(struct.pack("<HHII", number, 3, 1, value) for number, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(tags)) + content + bytes(4)


def row_of(content: bytes) -> list[Any]:
    """The pixels that a file of one row is decoded to."""
    image = decode_image(EmbeddedPicture(content))
    return [image.getpixel((x, 0)) for x in range(image.width)]


def paletted(transparency: Any) -> Image.Image:
    picture = Image.new("P", (1, 1), 1)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.info["transparency"] = transparency
    return picture


def keyed(mode: str, colour: Any) -> Image.Image:
    picture = Image.new(mode, (1, 1), colour)
    picture.info["transparency"] = colour
    return picture


HALF = {
    "RGBA": Image.new("RGBA", (1, 1), (200, 60, 20, 128)),
    "LA": Image.new("LA", (1, 1), (60, 128)),
    "P-alphas": paletted(b"\xff\x80"),
    "RGBa": Image.new("RGBA", (1, 1), (200, 60, 20, 128)).convert("RGBa"),
    "La": Image.new("LA", (1, 1), (60, 128)).convert("La"),
    "PA": Image.new("RGBA", (1, 1), (200, 60, 20, 128)).convert("PA"),
}
"""Half transparent pictures by how they are stored."""
CLEAR = {
    "RGBA": Image.new("RGBA", (1, 1), (200, 60, 20, 0)),
    "LA": Image.new("LA", (1, 1), (60, 0)),
    "PA": Image.new("RGBA", (1, 1), (200, 60, 20, 0)).convert("PA"),
    "RGBa": Image.new("RGBa", (1, 1), (0, 0, 0, 0)),
    "La": Image.new("La", (1, 1), (0, 0)),
    "P": paletted(1),
    "P-alphas": paletted(b"\xff\0"),
    "1": keyed("1", 0),
    "L": keyed("L", 60),
    "RGB": keyed("RGB", (200, 60, 20)),
    "I;16": keyed("I;16", 300),
    "I;16B": keyed("I;16B", 300),
    "I;16L": keyed("I;16L", 300),
}
"""Transparent pictures by how they are stored."""
OPAQUE = {mode: Image.new("RGB", (1, 1), (200, 60, 20)).convert(mode) for mode in ("RGB", "L", "P", "CMYK", "YCbCr")}
OPAQUE |= {mode: Image.new("RGB", (1, 1), (200, 60, 20)).convert(mode) for mode in ("HSV", "LAB", "RGBX", "1")}


@pytest.mark.parametrize("kind", CLEAR)
def test_what_is_transparent_is_white(kind: str) -> None:
    assert has_transparency(CLEAR[kind])
    assert as_rgb(CLEAR[kind]).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", HALF)
def test_what_is_half_transparent_is_mixed_with_white(kind: str) -> None:
    picture = HALF[kind]
    colour = {"LA": (60, 60, 60), "La": (60, 60, 60), "P-alphas": (40, 50, 60)}.get(kind, (200, 60, 20))
    expected = [round(level * 128 / 255 + 255 - 128) for level in colour]
    assert has_transparency(picture)
    assert list(as_rgb(picture).getpixel((0, 0))) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("kind", OPAQUE)
def test_without_transparency_pillows_own_colours_are_kept(kind: str) -> None:
    picture = OPAQUE[kind]
    assert not has_transparency(picture)
    assert as_rgb(picture).getpixel((0, 0)) == picture.convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
def test_a_transparent_colour_of_a_mode_that_has_none_is_ignored(mode: str) -> None:
    picture = OPAQUE[mode].copy()
    picture.info["transparency"] = 0
    assert as_rgb(picture).getpixel((0, 0)) == OPAQUE[mode].convert("RGB").getpixel((0, 0))


def test_every_alpha_gives_the_pixels_of_transformers_and_vllm() -> None:
    from transformers.image_transforms import convert_to_rgb

    levels, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    picture = Image.fromarray(np.stack([levels, 255 - levels, levels, alphas], axis=-1), "RGBA")
    as_vllm_does = Image.new("RGB", picture.size, WHITE)
    as_vllm_does.paste(picture, mask=picture.split()[3])
    pixels = np.asarray(as_rgb(picture))
    assert (pixels == np.asarray(as_vllm_does)).all()
    assert (pixels == convert_to_rgb(picture, return_numpy=True)).all()


@pytest.mark.parametrize("kind", [*CLEAR, *HALF, *OPAQUE])
def test_a_picture_is_not_changed(kind: str) -> None:
    picture = {**CLEAR, **HALF, **OPAQUE}[kind]
    before = picture.copy()
    as_rgb(picture)
    assert (picture.mode, picture.info, picture.tobytes()) == (before.mode, before.info, before.tobytes())
    assert picture.getpalette("RGBA") == before.getpalette("RGBA") if picture.mode == "P" else True


GRAY_KEY, RGB_KEY = struct.Struct(">H"), struct.Struct(">HHH")
STORED = {
    "gray-1-black": (png(1, 0, b"\x40", 2, GRAY_KEY.pack(0)), [WHITE, WHITE]),
    "gray-1-white": (png(1, 0, b"\x40", 2, GRAY_KEY.pack(1)), [(0, 0, 0), WHITE]),
    "gray-2": (png(2, 0, b"\x64", 3, GRAY_KEY.pack(1)), [WHITE, (170,) * 3, WHITE]),
    "gray-2-black": (png(2, 0, b"\x10", 2, GRAY_KEY.pack(0)), [WHITE, (85,) * 3]),
    "gray-4": (png(4, 0, b"\x1e", 2, GRAY_KEY.pack(1)), [WHITE, (238,) * 3]),
    "gray-8": (png(8, 0, b"\7\10", 2, GRAY_KEY.pack(7)), [WHITE, (8,) * 3]),
    "gray-16": (png(16, 0, struct.pack(">HH", 0x1234, 0x1235), 2, GRAY_KEY.pack(0x1234)), [WHITE, (0x12,) * 3]),
    "rgb-8": (png(8, 2, b"\1\2\3\1\2\4", 2, RGB_KEY.pack(1, 2, 3)), [WHITE, (1, 2, 4)]),
    "rgb-16": (
        png(16, 2, struct.pack(">6H", 300, 600, 900, 256, 0, 0), 2, RGB_KEY.pack(300, 600, 900)),
        [WHITE, (1, 0, 0)],
    ),
    "rgb-16-dark": (
        png(16, 2, struct.pack(">6H", 3, 3, 3, 772, 771, 771), 2, RGB_KEY.pack(3, 3, 3)),
        [WHITE, (3, 3, 3)],
    ),
    "palette": (png(8, 3, b"\0\1", 2, b"\0", palette=bytes([10, 20, 30, 40, 50, 60])), [WHITE, (40, 50, 60)]),
    "palette-1": (png(1, 3, b"\x40", 2, b"\xff\0", palette=bytes([10, 20, 30, 40, 50, 60])), [(10, 20, 30), WHITE]),
    "palette-long": (
        png(8, 3, b"\0\1", 2, b"\0\xff" * 150, palette=bytes([10, 20, 30, 40, 50, 60])),
        [WHITE, (40, 50, 60)],
    ),
    "tiff-12-bits": (tiff(12, 1, b"\xff\xf8\x00", 2), [WHITE, (128,) * 3]),
    "tiff-16-bits": (tiff(16, 1, struct.pack("<HH", 0, 32768), 2), [(0,) * 3, (128,) * 3]),
    "tiff-16-negative": (tiff(16, 0, struct.pack("<HH", 0, 65535), 2), [WHITE, (0,) * 3]),
    "tiff-8-negative": (tiff(8, 0, b"\0\xff", 2), [WHITE, (0,) * 3]),
}
"""Files by how a pixel is stored, and the pixels that they hold."""


@pytest.mark.parametrize("kind", STORED)
def test_a_transparent_colour_and_its_neighbours_are_told_apart_in_files(kind: str) -> None:
    content, expected = STORED[kind]
    assert row_of(content) == expected


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_a_stamp_on_a_transparent_ground_stands_on_white(kind: str) -> None:
    """Whatever colours lie under the ground, as in the stamp of a bird that trained on brown blotches."""
    if kind not in ("PNG", "WEBP", "TIFF", "GIF"):
        pytest.importorskip("PIL._avif")
    stamp = Image.effect_noise((32, 32), 90).convert("RGBA")
    stamp.putalpha(0)
    stamp.paste((200, 60, 20, 255), (8, 8, 24, 24))
    exact = {"lossless": True, "exact": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    stamp.save(file := io.BytesIO(), kind, **exact)
    picture = decode_image(EmbeddedPicture(file.getvalue()))
    assert picture.getpixel((2, 2)) == picture.getpixel((29, 16)) == WHITE
    assert list(picture.getpixel((16, 16))) == pytest.approx([200, 60, 20], abs=4)


def test_a_transparent_picture_is_turned_as_its_exif_tag_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stamp = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    stamp.paste((0, 0, 0, 0), (0, 0, 4, 4))  # the left half, which a quarter turn clockwise brings to the top
    stamp.save(file := io.BytesIO(), "PNG", exif=exif)
    turned = decode_image(EmbeddedPicture(file.getvalue()))
    assert turned.size == (4, 8)
    assert [turned.getpixel((2, y)) for y in (0, 7)] == [WHITE, (0, 0, 0)]


def test_a_picture_that_was_opened_by_hand_is_read_as_its_file_is() -> None:
    for content, expected in STORED.values():
        opened = Image.open(io.BytesIO(content))
        image = decoded(opened, EmbeddedPicture(b"", "the picture"))
        assert [image.getpixel((x, 0)) for x in range(image.width)] == expected
