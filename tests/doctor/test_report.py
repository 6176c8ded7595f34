"""The table, the JSON and the exit code of `llava-train doctor`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.doctor import report
from llava_train.doctor.findings import Finding, Level
from llava_train.doctor.processes import Ended

FINE = Finding("python", Level.ok, "Python 3.12.4")
ODD = Finding("packages", Level.warning, "gradio [6] cannot be imported", "pip install -e '.[demo]'")
BROKEN = Finding("packages", Level.broken, "torch 2.5.1 is not >=2.11", "pip install 'torch>=2.11'")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the examination finds, to be filled; its step fails where something is broken."""
    findings: list[Finding] = []
    step = Ended(1, "Traceback\nImportError: torch", 1.0)
    monkeypatch.setattr(report, "look", lambda: (findings, step if report.is_broken(findings) else Ended(0, "", 1.0)))
    return findings


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80"})
    return done.exit_code, done.stdout


def test_warnings_are_shown_with_their_mend_and_fail_nothing(found: list[Finding]) -> None:
    found += [FINE, ODD]
    code, said = doctor()
    assert code == 0
    assert "gradio [6] cannot be imported" in said and "-> pip install -e '.[demo]'" in said
    assert said.splitlines()[-1].startswith("ready to train")


def test_what_is_broken_is_counted_and_is_exit_code_1(found: list[Finding]) -> None:
    found += [FINE, ODD, BROKEN]
    code, said = doctor()
    assert code == 1
    assert said.splitlines()[-1].startswith("1 broken")


def test_the_json_of_a_bug_report_has_the_output_of_the_step_that_failed(found: list[Finding]) -> None:
    found += [FINE, BROKEN]
    code, said = doctor("--json")
    record = json.loads(said)
    assert (code, record["ready"]) == (1, False)
    assert record["output"] == "Traceback\nImportError: torch"
    assert record["findings"][1] == {
        "topic": "packages",
        "level": "broken",
        "text": "torch 2.5.1 is not >=2.11",
        "mend": "pip install 'torch>=2.11'",
    }
    assert record["versions"]["torch"]
