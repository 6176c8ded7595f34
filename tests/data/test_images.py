from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from llava_train.config import ImageSection
from llava_train.data import images
from llava_train.data.images import HAS_AVIF, ImagePreprocessor, decode_image, decoded
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.problems import SampleError
from llava_train.model.build import build_llava
from tests.tiny import model_section


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = saved(Image.new(mode, (5, 4)), tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    assert (decode_image(path).mode, decode_image(path).size) == ("RGB", (5, 4))


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 128, (128, 128, 128)),
        ("LA", (128, 255), (128, 128, 128)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 256, (1, 1, 1)),
    ],
)
def test_colours_survive_the_way_to_rgb(mode: str, colour: object, rgb: tuple[int, int, int], tmp_path: Path) -> None:
    path = saved(Image.new(mode, (5, 4), colour), tmp_path / "x.tiff")
    assert Image.open(path).mode == mode
    assert decode_image(path).getpixel((2, 2)) == rgb


@pytest.mark.parametrize("transparency", [None, 0, b"\0\xff"])
def test_a_palette_becomes_its_colours_and_its_transparent_one_white(
    transparency: int | bytes | None, tmp_path: Path
) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    image = decode_image(saved(picture, tmp_path / "x.png", **options))
    first = (10, 20, 30) if transparency is None else (255, 255, 255)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [first, (40, 50, 60)]


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (8, 4))
    picture.paste("white", (0, 0, 4, 4))  # the left half, which a quarter turn clockwise brings to the top
    turned = decode_image(saved(picture, tmp_path / "x.png", exif=exif))
    assert turned.size == (4, 8)
    assert [turned.getpixel((2, y))[0] for y in (0, 7)] == [255, 0]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_every_orientation_is_undone_as_pillow_does(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.effect_noise((6, 4), 50).convert("RGB"), tmp_path / f"x.{kind}", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert decode_image(path).size == expected.size
    assert decode_image(path).tobytes() == expected.tobytes()


def test_a_picture_with_another_tag_written_wrong_is_turned_all_the_same(tmp_path: Path) -> None:
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x0128, 2, 3, b"in\0")]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + bytes(4)
    path = saved(Image.new("RGB", (8, 4)), tmp_path / "x.jpg", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(path))
    assert decode_image(path).size == (4, 8)


def test_a_gif_that_is_called_jpg_is_read(tmp_path: Path) -> None:
    path = saved(Image.new("P", (3, 3)), tmp_path / "x.gif").rename(tmp_path / "x.jpg")
    assert decode_image(path).size == (3, 3)


def test_of_a_phones_mpo_the_picture_is_read(tmp_path: Path) -> None:
    shot, depth = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = saved(shot, tmp_path / "x.mpo", save_all=True, append_images=[depth]).rename(tmp_path / "x.jpg")
    assert Image.open(path).n_frames == 2
    assert decode_image(path).getpixel((4, 4)) == (254, 0, 0)


AVIF_FILES = pytest.mark.skipif(not HAS_AVIF, reason="this Pillow reads no AVIF")


@AVIF_FILES
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_avif_is_read_and_turned_where_pillow_has_it(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.effect_noise((24, 16), 50).convert("RGB")
    path = saved(picture, tmp_path / "x.avif", quality=100, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert decode_image(path).tobytes() == expected.tobytes()
    assert decode_image(path).size == ((16, 24) if orientation in (6, 8) else (24, 16))


def test_avif_is_refused_in_words_where_pillow_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "HAS_AVIF", False)
    (tmp_path / "x.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0")
    with pytest.raises(SampleError, match=r"x.avif: an AVIF picture, which needs Pillow 11.3 or later .*; save it as"):
        decode_image(tmp_path / "x.avif")


def test_a_pillow_that_does_not_know_avif_is_asked_without_a_warning() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); from PIL import features; del features.modules['avif']; "
        "from llava_train.data.images import FORMATS; print(*FORMATS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "JPEG PNG WEBP GIF BMP TIFF\n", done.stderr


def test_a_phones_heic_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    with pytest.raises(SampleError, match="x.heic: a HEIC picture, which Pillow cannot read; save it as JPEG or PNG"):
        decode_image(tmp_path / "x.heic")


REFUSED = {
    "F": (Image.new("F", (5, 4), 0.5), "image_mode", "of mode F"),
    "I": (Image.new("I", (5, 4), 300), "image_mode", "of mode I"),
    "no width": (Image.new("RGB", (0, 4)), "image_empty", r"has no pixels \(0 x 4\)"),
    "no height": (Image.new("RGBA", (5, 0)), "image_empty", r"has no pixels \(5 x 0\)"),
    "nothing": (Image.new("I;16", (0, 0)), "image_empty", r"has no pixels \(0 x 0\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_in_memory_that_no_model_can_see_is_refused(name: str) -> None:
    image, kind, message = REFUSED[name]
    with pytest.raises(SampleError, match=f"the picture: {message}") as refused:
        decoded(image, EmbeddedPicture(b"", "the picture"))
    assert refused.value.kind == kind


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_32_bits_are_refused_from_a_file_as_from_memory(mode: str, tmp_path: Path) -> None:
    path, said = saved(Image.new(mode, (5, 4)), tmp_path / "x.tiff"), []
    for read in (lambda: decode_image(path), lambda: decoded(Image.open(path), path)):
        with pytest.raises(SampleError) as refused:
            read()
        said.append((refused.value.kind, str(refused.value)))
    assert said[0] == said[1]


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = saved(Image.effect_noise((64, 64), 50), tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SampleError, match="x.png: not a readable image"):
        decode_image(path)


@pytest.mark.parametrize(("content", "message"), [(b"", "empty \\(zero bytes\\)"), (b"hello", "not a readable image")])
def test_what_is_no_picture_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(SampleError, match=message):
        decode_image(tmp_path / "x.jpg")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="cannot be read: Is a directory"):
        decode_image(tmp_path)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff", pytest.param("avif", marks=AVIF_FILES)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_picture_is_read_or_refused_and_nothing_else(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("jpeg", "png", "webp") else {}
    whole = saved(Image.effect_noise((40, 30), 60).convert("RGB"), tmp_path / f"x.{kind}", **options).read_bytes()
    rng = random.Random(kind)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            content[rng.randrange(min(len(content), rng.choice([60, 300, 10000])))] = rng.randrange(256)
        damaged = tmp_path / "damaged"
        damaged.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        with contextlib.suppress(SampleError):
            assert decode_image(damaged).mode == "RGB"


def test_a_missing_picture_is_refused() -> None:
    with pytest.raises(SampleError, match="nowhere.png: the image file is missing"):
        decode_image(Path("nowhere.png"))


def test_postscript_is_not_started(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 4)), tmp_path / "x.eps")
    with pytest.raises(SampleError, match="not a readable image"):
        decode_image(path)


@pytest.mark.parametrize("size", [(11, 10), (100, 100)], ids=["suspected", "certain"])
def test_a_decompression_bomb_is_refused(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError, match="decompression bomb"):
        decode_image(saved(Image.new("RGB", size), tmp_path / "x.png"))


@pytest.mark.parametrize("aspect", ["pad", "crop", "resize"])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (28, 28), (1, 1), (3, 50)])
def test_every_shape_becomes_the_encoders_square(aspect: str, size: tuple[int, int]) -> None:
    llava = build_llava(model_section(), ImageSection(aspect=aspect), torch.float32)
    preprocessor = ImagePreprocessor(llava.processor.image_processor)
    pixels = preprocessor(Image.new("RGB", size, (10, 200, 90)))
    assert (pixels.shape, pixels.dtype) == ((3, 28, 28), torch.float32)
    assert pixels.shape == preprocessor.blank().shape
    processor = llava.processor.image_processor
    for channel, value in enumerate((10, 200, 90)):  # the middle pixel is the picture's under every aspect
        expected = (value / 255 - processor.image_mean[channel]) / processor.image_std[channel]
        if aspect != "pad" or min(size) > 3:
            assert pixels[channel, 14, 14].item() == pytest.approx(expected, abs=0.02)


def test_the_picture_lies_in_the_middle_of_its_padding() -> None:
    llava = build_llava(model_section(), ImageSection(aspect="pad"), torch.float32)
    pixels = ImagePreprocessor(llava.processor.image_processor)(Image.new("RGB", (56, 28), "white"))
    is_padding = pixels.abs().amax(dim=(0, 2)) < 0.05  # rows of the encoder's mean colour
    assert is_padding.tolist() == [True] * 6 + is_padding[6:22].tolist() + [True] * 6
    assert not is_padding[8:20].any()


def test_crop_drops_the_ends_and_resize_keeps_them() -> None:
    picture = Image.new("RGB", (84, 28), "black")
    picture.paste("white", (0, 0, 28, 28))
    left = {}
    for aspect in ("crop", "resize"):
        processor = build_llava(model_section(), ImageSection(aspect=aspect), torch.float32).processor.image_processor
        left[aspect] = ImagePreprocessor(processor)(picture)[0, 14, 2].item()
    assert left["crop"] < 0 < left["resize"]


def test_blank_pixels_are_the_encoders_mean_colour() -> None:
    llava = build_llava(model_section(), ImageSection(), torch.float32)
    processor = llava.processor.image_processor
    mean = tuple(round(255 * value) for value in processor.image_mean)
    preprocessor = ImagePreprocessor(processor)
    assert (preprocessor(Image.new("RGB", (28, 28), mean)) - preprocessor.blank()).abs().max() < 0.01
