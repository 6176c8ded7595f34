"""What every result says of where it comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts import load_script

machine = load_script("benchmarks/machine.py")


def test_the_commit_of_a_checkout_with_changes_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    script = tmp_path / "machine.py"
    script.write_text("")
    git("init")
    git("add", "machine.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(script))
    assert "+" not in machine.about_this("cpu")["commit"]
    script.write_text("changed")
    assert machine.about_this("cpu")["commit"].endswith("+changes")


def test_a_start_on_a_gpu_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    startup = load_script("benchmarks/startup.py")
    asked: list[str] = []
    monkeypatch.setattr(startup, "about_this", lambda device: asked.append(device) or {})
    monkeypatch.setattr(startup, "slowest_imports", dict)
    monkeypatch.setattr(startup, "has_data", lambda _: False)
    monkeypatch.setattr(sys, "argv", ["startup.py"])
    for found in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        startup.main()
    assert asked == ["cuda", "cpu"]
