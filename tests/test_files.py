from __future__ import annotations

from pathlib import Path

import pytest

from llava_train.files import MANIFEST, damage, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"aaaa")
    (tmp_path / "deep/b.bin").write_bytes(b"bbbb")
    write_manifest(tmp_path, step=7)
    return tmp_path


def test_a_complete_folder_has_its_facts_and_no_damage(folder: Path) -> None:
    assert damage(folder) is None
    manifest = read_manifest(folder)
    assert manifest["step"] == 7
    assert manifest["files"].keys() == {"a.bin", "deep/b.bin"}


def test_a_folder_without_a_manifest_is_not_complete(tmp_path: Path) -> None:
    assert damage(tmp_path) == "no readable COMPLETE manifest"
    assert read_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_manifest_that_was_cut_off_does_not_count(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert damage(folder) == "no readable COMPLETE manifest"


def test_missing_truncated_and_flipped_files_are_noticed(folder: Path) -> None:
    file = folder / "deep/b.bin"
    file.write_bytes(b"bbbc")
    assert damage(folder) == "deep/b.bin has another checksum"
    file.write_bytes(b"bb")
    assert damage(folder) == "deep/b.bin has 2 bytes, not 4"
    file.unlink()
    assert damage(folder) == "deep/b.bin is missing"
