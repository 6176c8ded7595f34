from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from llava_train.files import (
    MANIFEST,
    damage,
    folder_written_aside,
    read_manifest,
    write_manifest,
    written_aside,
)


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


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/page.html"
    with written_aside(path) as file:
        file.write("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with written_aside(path, "wb") as file:
        file.write(b"newer")
        assert path.read_text() == "new"
    assert path.read_bytes() == b"newer"
    assert names_in(path.parent) == ["page.html"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_where_writing_fails(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("precious")
    with pytest.raises(error), written_aside(path) as file:
        file.write("half")
        file.flush()
        raise error
    assert path.read_text() == "precious"
    assert names_in(tmp_path) == ["page.html"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("precious")
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"), written_aside(path) as file:
        file.write("half")
    assert path.read_text() == "precious"
    assert names_in(tmp_path) == ["page.html"]


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no file reach the disk."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llava_train.files.os.fsync", fsync)


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/page.html").write_text("old")
    (tmp_path / "elsewhere/page.html").chmod(0o640)
    (tmp_path / "page.html").symlink_to(tmp_path / "elsewhere/page.html")
    with written_aside(tmp_path / "page.html") as file:
        file.write("new")
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "elsewhere/page.html").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "elsewhere/page.html").stat().st_mode) == 0o640
    with written_aside(tmp_path / "fresh") as file:
        file.write("new")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_write_protected_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("precious")
    monkeypatch.setattr("llava_train.files.os.access", lambda *_: False)  # root may write to all
    with pytest.raises(PermissionError, match="page.html"), written_aside(path) as file:
        file.write("new")
    assert path.read_text() == "precious"


def test_what_is_no_regular_file_is_written_in_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    with written_aside(tmp_path / "pipe") as file:
        file.write("through the pipe")
    reader.join()
    assert found == ["through the pipe"]
    assert (tmp_path / "pipe").is_fifo()
    with written_aside(Path(os.devnull)) as file:
        file.write("gone")
    assert Path(os.devnull).is_char_device()


def test_half_a_character_is_written_as_its_escape(tmp_path: Path) -> None:
    with written_aside(tmp_path / "x") as file:
        file.write("a\ud800ü")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "a\\ud800ü"


def test_a_folder_takes_its_place_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("old", "new"):
        with folder_written_aside(out) as folder:
            (folder / content).write_text(content)
    assert names_in(out) == ["new"]
    with pytest.raises(ValueError, match="no more"), folder_written_aside(out) as folder:
        (folder / "half").write_text("")
        raise ValueError("no more")
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["new"]


def test_a_git_lfs_pointer_is_named_as_the_damage(folder: Path) -> None:
    (folder / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    assert "a.bin is a Git LFS pointer" in str(damage(folder))
