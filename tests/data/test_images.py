from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from llava_train.data.images import decode_image
from llava_train.data.samples import SampleError


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = saved(Image.new(mode, (5, 4)), tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    assert (decode_image(path).mode, decode_image(path).size) == ("RGB", (5, 4))


def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(Image.new("RGB", (8, 4)), tmp_path / "x.jpg", exif=exif)).size == (4, 8)


def test_a_gif_that_is_called_jpg_is_read(tmp_path: Path) -> None:
    path = saved(Image.new("P", (3, 3)), tmp_path / "x.gif").rename(tmp_path / "x.jpg")
    assert decode_image(path).size == (3, 3)


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = saved(Image.effect_noise((64, 64), 50), tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SampleError, match="x.png: not a readable image"):
        decode_image(path)


@pytest.mark.parametrize(("content", "message"), [(b"", "not a readable image"), (b"hello", "not a readable image")])
def test_what_is_no_picture_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(SampleError, match=message):
        decode_image(tmp_path / "x.jpg")


def test_a_missing_picture_is_refused() -> None:
    with pytest.raises(SampleError, match="nowhere.png: the image file is missing"):
        decode_image(Path("nowhere.png"))


def test_postscript_is_not_started(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "x.eps")
    with pytest.raises(SampleError, match="not a readable image"):
        decode_image(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError, match="decompression bomb"):
        decode_image(saved(Image.new("RGB", (11, 10)), tmp_path / "x.png"))
