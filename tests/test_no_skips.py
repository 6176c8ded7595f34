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


def test_a_skip_is_a_failure_where_its_marker_must_not_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    places = ["-p", "tests.conftest", f"--rootdir={tmp_path}", "test_some.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *places, "--no-skips", "cluster"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stdout.splitlines()[-1].count("1 passed, 1 skipped") == done.stdout.splitlines()[-1].count("2 errors") == 1
    )
    assert "no cluster here; --no-skips cluster forbids that" in done.stdout
    assert "not root; --no-skips cluster forbids that" in done.stdout
