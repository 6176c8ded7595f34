"""Pictures are found in folders and archives, and nothing outside them is read."""

from __future__ import annotations

import base64
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from llava_train.data import archives
from llava_train.data.images import decode_image
from llava_train.data.pictures import EmbeddedPicture, PictureFolder, Pictures
from llava_train.data.problems import DataError, SampleError
from llava_train.data.sources import open_source

NAMES = ["a.png", "deep/er/b.jpg", "ünï/北京.png", "deep/c.png"]


def encoded(colour: tuple[int, int, int] = (200, 10, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encoded((number, 0, 0)))
    return tmp_path / "images"


def packed(kind: str, folder: Path) -> Path:
    """The pictures of a folder as one archive, whose name does not tell what it is."""
    path = folder.parent / "pictures"
    files = [(str(file.relative_to(folder)), file) for file in folder.rglob("*") if file.is_file()]
    if kind.startswith("zip"):
        method = zipfile.ZIP_DEFLATED if kind == "zip deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.mkdir("deep")
            for name, file in files:
                archive.write(file, name)
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as archive:
            for name, file in files:
                archive.add(file, f"./{name}")
    return path


def pictures_of(images: Any, folder: Path, cache: Path | None = None) -> Pictures:
    data = folder / "data.json"
    data.write_text('[{"id": "x"}]')
    return open_source(data, images, cache=cache).pictures


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "in memory"])
@pytest.mark.parametrize("kind", ["folder", "zip", "zip deflated", "tar"])
def test_the_same_pictures_are_found_in_folders_and_archives(
    kind: str, kept: bool, folder: Path, tmp_path: Path
) -> None:
    images = folder if kind == "folder" else packed(kind, folder)
    pictures = pictures_of(images, tmp_path, tmp_path / "cache" if kept else None)
    for number, name in enumerate(NAMES):
        picture = pickle.loads(pickle.dumps(pictures.picture(name)))
        assert picture.open("rb").read() == encoded((number, 0, 0))
        assert decode_image(picture).getpixel((1, 1)) == (number, 0, 0)
        assert str(picture).endswith(name)
    with pytest.raises(SampleError) as caught:
        decode_image(pictures.picture("deep/d.png"))
    assert caught.value.kind == "image_missing"
    assert "deep/d.png" in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "deep/../../secret.png", "deep/../a.png"])
def test_a_path_that_leaves_its_root_is_refused(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    pictures = pictures_of(folder if kind == "folder" else packed(kind, folder), tmp_path)
    with pytest.raises(SampleError, match="leaves the") as caught:
        pictures.picture(name)
    assert caught.value.kind == "path_outside_root"


def test_a_link_out_of_the_root_is_refused_until_its_target_is_declared(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "x.png").write_bytes(encoded())
    (folder / "coco").symlink_to(other)
    (folder / "inner").symlink_to(folder / "deep")
    pictures = pictures_of(folder, tmp_path)
    assert decode_image(pictures.picture("inner/c.png")).size == (30, 20)
    with pytest.raises(SampleError, match=r"is a link to .*elsewhere/x.png, outside .*; write `images: ") as caught:
        decode_image(pictures.picture("coco/x.png"))
    assert caught.value.kind == "symlink_outside_root"
    linked = pictures_of({"": str(folder), "other": str(other)}, tmp_path)
    assert decode_image(linked.picture("coco/x.png")).size == (30, 20)
    declared = pictures_of({"": str(folder), "coco": str(other)}, tmp_path)
    assert decode_image(declared.picture("coco/x.png")).size == (30, 20)
    assert decode_image(declared.picture("a.png")).size == (30, 20)


@pytest.mark.parametrize("link", ["coco", "deep/coco", "one.png"])
@pytest.mark.parametrize("stated", ["folder", "mapping", "prefix"])
def test_the_mapping_that_a_refused_link_shows_is_the_one_that_works(
    stated: str, link: str, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "else where"
    other.mkdir()
    (other / "x.png").write_bytes(encoded())
    is_file = link.endswith(".png")
    (folder / link).symlink_to(other / "x.png" if is_file else other)
    images: Any = {"folder": str(folder), "mapping": {"": str(folder)}, "prefix": {"all": str(folder)}}[stated]
    name = ("all/" if stated == "prefix" else "") + (link if is_file else f"{link}/x.png")
    with pytest.raises(SampleError) as caught:
        decode_image(pictures_of(images, tmp_path).picture(name))
    shown = yaml.safe_load("{" + str(caught.value).split("`")[1] + "}")
    images = shown["images"] if stated == "folder" else {**images, **shown}
    assert decode_image(pictures_of(images, tmp_path).picture(name)).size == (30, 20)
    assert decode_image(pictures_of(images, tmp_path).picture(name.replace(link, "a.png").removesuffix("/x.png")))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_picture_that_git_lfs_has_not_fetched_is_named_as_such(kind: str, folder: Path, tmp_path: Path) -> None:
    (folder / "a.png").write_bytes(LFS_POINTER)
    pictures = pictures_of(folder if kind == "folder" else packed(kind, folder), tmp_path)
    with pytest.raises(SampleError, match="a.png: a Git LFS pointer, .* `git lfs pull`") as caught:
        decode_image(pictures.picture("a.png"))
    assert caught.value.kind == "not_an_image"


def test_an_archive_that_git_lfs_has_not_fetched_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures.zip").write_bytes(LFS_POINTER)
    with pytest.raises(DataError, match=r"pictures.zip is a Git LFS pointer, .* `git lfs pull`"):
        pictures_of(tmp_path / "pictures.zip", tmp_path)


READ_NAMES = """
import sys
from pathlib import Path
from llava_train.data.images import decode_image
from llava_train.data.sources import open_source
for path, images in (("data.json", "images"), ("北京.json", "images"), ("data.json", "北京")):
    try:
        decode_image(open_source(path, images).pictures.picture("ünï/北京.png"))
    except Exception as error:
        print(type(error).__name__, getattr(error, "kind", ""), ascii(str(error)))
    else:
        print("read")
"""


@pytest.mark.parametrize("encodes", [True, False])
def test_a_name_that_the_locale_cannot_encode_is_told_as_that(encodes: bool, folder: Path, tmp_path: Path) -> None:
    for path in ("data.json", "北京.json"):
        (tmp_path / path).write_text('[{"id": "x"}]')
    (tmp_path / "北京").symlink_to(folder)
    settings = {"LC_ALL": "C", "PYTHONUTF8": str(int(encodes)), "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "read.py").write_text(READ_NAMES, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "read.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    if encodes:
        assert lines == ["read"] * 3
        return
    assert lines[0].startswith("SampleError image_unreadable")
    assert [line.split()[0] for line in lines[1:]] == ["DataError"] * 2
    for line in lines:
        assert "the locale cannot encode" in line
        assert "PYTHONUTF8=1" in line
        assert "not a readable image" not in line


def test_a_root_may_be_a_link_and_an_absolute_path_may_lie_inside_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    pictures = pictures_of(tmp_path / "link", tmp_path)
    for name in ("a.png", str(folder / "a.png"), str(tmp_path / "link/a.png")):
        assert decode_image(pictures.picture(name)).size == (30, 20)


def test_prefixes_choose_the_store_the_longest_first(folder: Path, tmp_path: Path) -> None:
    images = {"coco": str(folder / "deep"), "coco/zipped/": str(packed("zip", folder))}
    pictures = pictures_of(images, tmp_path)
    assert str(pictures.picture("coco/er/b.jpg")) == str(folder / "deep/er/b.jpg")
    assert str(pictures.picture("coco/zipped/a.png")).endswith("pictures:a.png")
    by_absolute_path = pictures_of({str(folder): str(folder / "deep")}, tmp_path)
    assert str(by_absolute_path.picture(f"{folder}/c.png")) == str(folder / "deep/c.png")
    with pytest.raises(SampleError, match="begins with none of the prefixes of `images:`: coco/zipped, coco"):
        pictures.picture("cocoa/a.png")


def test_an_image_value_may_be_bytes_or_a_data_url() -> None:
    pictures = Pictures(PictureFolder(Path()))
    url = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    for value in (encoded(), {"bytes": encoded(), "path": None}, url):
        assert decode_image(pictures.picture(value)).size == (30, 20)
    assert pictures.picture({"bytes": b"", "path": "x.png"}) == EmbeddedPicture(b"", "x.png")


@pytest.mark.parametrize(("kind", "place"), [("zip", "end"), ("zip", "middle"), ("zip deflated", "middle")])
def test_a_damaged_archive_spoils_its_own_pictures_alone(kind: str, place: str, folder: Path, tmp_path: Path) -> None:
    (folder / "noise.bmp").write_bytes(Image.effect_noise((64, 64), 60).tobytes())
    path = packed(kind, folder)
    pictures = pictures_of(path, tmp_path)
    content, offset = bytearray(path.read_bytes()), pictures.store.find("noise.bmp").offset
    content[offset + 300] ^= 0xFF
    path.write_bytes(content[: offset + 200] if place == "end" else content)
    with pytest.raises(SampleError) as caught:
        pictures.picture("noise.bmp").open("rb")
    assert caught.value.kind == ("image_truncated" if place == "end" else "image_damaged")
    if place == "middle":
        assert pictures.picture("a.png").open("rb").read() == (folder / "a.png").read_bytes()


@pytest.mark.parametrize("kind", ["tar.gz", "text", "empty"])
def test_what_is_no_archive_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    path = packed(kind, folder) if kind == "tar.gz" else tmp_path / "file"
    if kind != "tar.gz":
        path.write_text("hello" if kind == "text" else "")
    with pytest.raises(DataError, match="neither a folder nor a ZIP or plain TAR archive"):
        pictures_of(path, tmp_path)


def test_missing_image_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: there is no such image folder or archive"):
        pictures_of(tmp_path / "nowhere", tmp_path)


def test_an_encrypted_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    path = packed("zip", folder)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted or compressed unusually"):
        pictures_of(path, tmp_path)


def test_a_link_to_itself_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(SampleError) as caught:
        decode_image(pictures_of(folder, tmp_path).picture("loop.png"))
    assert caught.value.kind == "image_unreadable"


def test_a_member_too_large_for_a_picture_is_not_inflated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = pictures_of(packed("zip deflated", folder), tmp_path)
    monkeypatch.setattr(archives, "_LARGEST", 50)
    with pytest.raises(SampleError) as caught:
        decode_image(pictures.picture("a.png"))
    assert caught.value.kind == "decompression_bomb"


def test_hard_links_and_odd_names_in_a_tar_spoil_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "same.png").hardlink_to(folder / "a.png")
    (folder / "odd\udcff.png").write_bytes(encoded())
    pictures = pictures_of(packed("tar", folder), tmp_path)
    for name in ("same.png", "a.png"):
        assert pictures.picture(name).open("rb").read() == (folder / "a.png").read_bytes()
