"""`pytest --no-skips MARKER`: CI has what these tests need, so a skip there hides something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.train.helpers import environment

TESTS = """
import pytest

@pytest.fixture
def cluster():
    pytest.skip("no cluster here")

@pytest.mark.cluster
def test_in_a_fixture(cluster): ...

@pytest.mark.cluster
@pytest.mark.skipif(True, reason="not root")
def test_by_a_mark(): ...

@pytest.mark.cuda
def test_of_another_marker(cluster): ...

@pytest.mark.cluster
def test_that_runs(): ...
"""


def outcome(folder: Path, *options: str) -> tuple[int, str]:
    (folder / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", f"--rootdir={folder}", "test_some.py", *options]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_skip_is_a_failure_where_its_marker_must_not_be_skipped(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, "--no-skips", "cluster")
    assert code == 1
    assert "2 failed, 1 passed, 1 skipped" in said
    assert "Skipped: no cluster here; --no-skips cluster forbids that" in said
    assert "not root; --no-skips cluster forbids that" in said


def test_elsewhere_it_is_a_skip(tmp_path: Path) -> None:
    code, said = outcome(tmp_path)
    assert code == 0
    assert "1 passed, 3 skipped" in said
