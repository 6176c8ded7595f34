"""What a file is told to be by its first bytes."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava_train.file_kinds import kind_of_file


def picture(format_: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, format_)
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), "x")  # of a fixed date, for names of tests
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    return buffer.getvalue()


STAGE = (Path(__file__).parents[1] / "configs/smoke/stage1.yaml").read_bytes()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *[(f"a.{kind}", picture(kind), f"a {kind} picture") for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")],
        ("a.webp", picture("WEBP"), "a WebP picture"),
        ("a.json", b'[{"id": 1}]', "a JSON file"),
        ("a", b' {"id": 1}\n{"id": 2}\n', "a JSON file"),
        ("a", b'"just a text"', "a JSON file"),
        ("a.json", json.dumps([{"id": 1}]).encode("utf-16"), "a JSON file in UTF-16"),
        ("a.csv", b"id,image\n1,a.png\n2,b.png\n", "a CSV table"),
        ("a.txt", b'id;text\n1;"two; words"\n2;"a line\nand one more"\n', "a CSV table"),
        ("a.csv", b"question\nWhat?\n", "a CSV table"),
        ("a.tsv", b"id\timage\n1\ta.png\n", "a TSV table"),
        ("a.yaml", b"- id: 1\n  image: a.png\n", "a YAML file"),
        ("a.yml", b"# mine\nlr: 1\n", "a YAML file"),
        ("stage", STAGE, "a stage file"),
        ("README.md", b"# About\n\nA stage file:\n\n```yaml\n" + STAGE + b"```\n", "a text"),
        ("a.bin", b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page, as a failed download leaves one"),
        ("a", b"<?xml version='1.0'?><a/>", "an XML file"),
        ("a", b"Just some words about it.", "a text"),
        ("a.bin", POINTER, "a Git LFS pointer, whose content was not downloaded"),
        ("a.pkl", pickle.dumps({"a": 1}), "a pickle"),
        ("a.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel file"),
        ("a.zip", zipped("a.png"), "a ZIP archive"),
        ("a.zip", zipped("a.png")[:40], "a damaged ZIP archive"),
        ("a.npz", zipped("a.npy"), "NumPy arrays"),
        ("a.tar", tarred(), "a TAR archive"),
        ("a", b"SQLite format 3\x00....", "an SQLite database"),
        ("a", b"", "an empty file"),
        ("a", b"\x00" * 99, "a file of blanks"),
        ("a", b"\x01\x02\x00\x03\x9f", None),
    ],
)
def test_a_file_is_known_by_its_content(name: str, content: bytes, words: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    kind = kind_of_file(tmp_path / name)
    assert (kind and kind.words) == words


def test_weights_are_known(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    torch.save(tensors, tmp_path / "a.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "a.safetensors")
    kinds = [kind_of_file(tmp_path / name) for name in ("a.bin", "old.bin", "a.safetensors")]
    assert [kind and kind.words for kind in kinds] == ["a file of PyTorch", "a pickle", "a safetensors file"]
