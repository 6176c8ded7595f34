"""What the doctor says of others' business, and of checks that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_train.doctor.findings import Level, discreet, found


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> list:
        raise AttributeError("no such thing in this version")

    (finding,) = found("packages", check)
    assert (finding.topic, finding.level) == ("packages", Level.warning)
    assert finding.text == "could not be looked at: AttributeError: no such thing in this version"


def test_texts_name_no_user_and_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/tmp")
    monkeypatch.setenv("HOME", "/home/ada")
    said = "/home/ada/hub, /mnt/ada/runs, /mnt/ada: full, /scratch/tmp/x1/stage.yaml, /mnt/adapters, /mnt/ada-2"
    assert discreet(said) == "~/hub, /mnt/USER/runs, /mnt/USER: full, TMP/x1/stage.yaml, /mnt/adapters, /mnt/ada-2"
