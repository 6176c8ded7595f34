"""How a process ends that failed: message, exit code, traceback file."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from llava_train.errors import UserError, user_errors
from llava_train.failures.words import Context
from llava_train.last_words import keep, own_place, redacted, speaks, tell
from llava_train.run_files import CACHE_FOLDER, ERRORS_FOLDER


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temp folder of these tests."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "tmp"


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_unknown_failure_of_a_command_ends_it_with_1_and_a_file(
    capsys: pytest.CaptureFixture[str], temporary: Path
) -> None:
    with pytest.raises(SystemExit) as ended, user_errors("llava-train ask"):
        raise KeyError("logits")
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert lines[0] == "error: llava_train failed in llava-train ask, and does not know why"
    assert lines[1].startswith("KeyError: 'logits'") and len(lines) <= 8
    [file] = temporary.rglob("*.txt")
    assert lines[2] == f"traceback: {file}"
    assert file.read_text().endswith("KeyError: 'logits'\n")


def test_what_a_user_can_mend_ends_a_command_with_2_and_leaves_no_file(
    capsys: pytest.CaptureFixture[str], temporary: Path
) -> None:
    for error in (UserError("no such stage file"), raised(UserError("no such stage file"), FileNotFoundError("x"))):
        with pytest.raises(SystemExit) as ended, user_errors():
            raise error
        assert ended.value.code == 2 and capsys.readouterr().err == "error: no such stage file\n"
    assert not list(temporary.rglob("*.txt"))


def test_a_users_error_that_a_machine_caused_names_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "table.arrow")
    assert tell(raised(UserError("table.arrow: cannot keep it"), full), Context()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: table.arrow: cannot keep it"
    assert "No space left on device" in Path(second.removeprefix("traceback: ")).read_text()


def test_a_file_that_cannot_be_read_is_told_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        Path("no/such/file").read_text()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no/such/file: No such file or directory")


def test_ctrl_c_ends_a_command_quietly_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and not capsys.readouterr().err


def test_a_closed_pipe_and_the_errors_of_the_command_line_pass() -> None:
    for error in (BrokenPipeError(), typer.BadParameter("no such name"), typer.Exit(3)):
        with pytest.raises(type(error)), user_errors():
            raise error


def test_verbose_prints_the_traceback_too(capsys: pytest.CaptureFixture[str]) -> None:
    tell(raised(KeyError("a")), Context(), verbose=True)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_neither_message_nor_file_holds_a_secret(
    capsys: pytest.CaptureFixture[str], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    secrets = ["0123456789abcdef", "hf_abcdefghijklmnopqrstuv", "me:word@"]
    tell(
        raised(ValueError("0123456789abcdef hf_abcdefghijklmnopqrstuv https://me:word@host/")), Context(), verbose=True
    )
    [file] = temporary.rglob("*.txt")
    for text in (capsys.readouterr().err, file.read_text()):
        assert "https://" in text and not any(secret in text for secret in secrets)
    assert redacted("zero 2", {"SOME_KEY": "2", "PATH": "zero"}) == "zero 2", "what is short or public stays"


def test_a_folder_of_tracebacks_keeps_the_newest(tmp_path: Path) -> None:
    errors = tmp_path / ERRORS_FOLDER
    errors.mkdir()
    for number in range(30):
        (errors / f"20200101-0000{number:02}-rank0.txt").touch()
    (errors / "notes.txt").touch()
    kept = keep(KeyError("a"), Context(run_dir=tmp_path))
    assert isinstance(kept, Path) and kept.parent == errors
    assert len(list(errors.glob("*-rank*.txt"))) == 20 and kept.exists() and (errors / "notes.txt").exists()


def test_the_traceback_of_a_run_that_has_no_folder_yet_is_kept_beside_the_runs(tmp_path: Path) -> None:
    (tmp_path / CACHE_FOLDER).mkdir()
    kept = keep(KeyError("a"), Context(run_dir=tmp_path / "run"))
    assert isinstance(kept, Path) and kept.parent == tmp_path / CACHE_FOLDER / ERRORS_FOLDER
    assert not (tmp_path / "run").exists()


def test_a_traceback_that_cannot_be_kept_in_the_runs_folder_goes_elsewhere(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / ERRORS_FOLDER).touch()
    kept = keep(KeyError("a"), Context(run_dir=tmp_path))
    assert isinstance(kept, Path) and temporary in kept.parents
    for folder in temporary.iterdir():
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    kept = keep(KeyError("a"), Context())
    assert isinstance(kept, Path) and (tmp_path / "moved") not in kept.resolve().parents, "a link may lead anywhere"


def test_a_machine_without_a_temporary_folder_still_has_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    assert tell(raised(OSError(errno.ENOSPC, "No space left on device", "/tmp/a")), Context()) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ") and "traceback not kept: no folder" in said


def test_what_all_ranks_see_is_said_once_a_machine() -> None:
    error, places = UserError("a key"), [(0, 0), (1, 1), (8, 0), (9, 1)]
    assert [speaks(error, Context(rank, 16, local)) for rank, local in places] == [True, False, True, False]
    error.told_by_main = True
    assert not speaks(error, Context(8, 16, 0))
    error = UserError("this rank's")
    error.on_every_rank = False
    assert speaks(error, Context(9, 16, 1))


def test_the_place_of_a_failure_is_the_innermost_of_this_package() -> None:
    def fail() -> None:
        raise KeyError("a")

    error = pytest.raises(KeyError, lambda: _within_package(fail)).value
    assert own_place(error).startswith("llava_train/train/world.py:") and own_place(error).endswith(" in on_main")
    assert own_place(raised(KeyError("a"))) == ""


def _within_package(fail: object) -> None:
    import torch

    from llava_train.train.world import World

    World(0, 1, torch.device("cpu")).on_main(fail)  # type: ignore[arg-type]
