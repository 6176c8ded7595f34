"""A reader that leaves, such as `head`, changes neither what a command does nor how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import read_lines, run_ranks, write_samples, write_stage
from tests.use.evaluations import command, write_pope
from tests.use.exports import export_tiny, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all the commands have left."""
    folder = tmp_path_factory.mktemp("unread")
    write_samples(folder / "data.json", "it" * 4)
    write_samples(folder / "bad.json", "itx")
    good, bad = write_stage(folder / "good.yaml"), write_stage(folder / "bad.yaml", data=[{"path": "bad.json"}])
    model, run = export_tiny(folder / "model"), write_run(folder / "run")
    data = write_pope(folder)
    commands: dict[str, list[Any]] = {
        "check": ["check", "--config", good, "--workers", 1],
        "check of bad data": ["check", "--config", bad, "--workers", 1, "--write-clean", folder / "clean.jsonl"],
        "check --json": ["check", "--config", good, "--workers", 1, "--json"],
        "preview": ["preview", "--config", good, "--html", folder / "preview.html"],
        "preview --json": ["preview", "--config", good, "--json"],
        "plan": ["plan", "--config", good],
        "plan of too little": ["plan", "--config", good, "--memory", "0.001G"],
        "schema": ["schema"],
        "report": ["report", run, "--out", folder / "report.html"],
        "evaluate": command(model, data),
        "ask": ["ask", model, folder / "images/0.png", "What?", "--max-new-tokens", 3],
        "doctor": ["doctor", "--json"],
    }
    spec = {name: {"arguments": list(map(str, each)), "descriptors": [1]} for name, each in commands.items()}
    spec["check 2>&1"] = {**spec["check of bad data"], "descriptors": [1, 2]}
    (folder / "commands.json").write_text(json.dumps(spec))
    run_ranks(["-m", "tests.closed_pipe", folder / "commands.json"], folder).check()
    return folder


def test_a_command_ends_as_it_would_with_a_reader(folder: Path) -> None:
    codes = json.loads((folder / "codes.json").read_text())
    failing = {"check of bad data", "check 2>&1", "plan of too little"}
    assert codes == {name: int(name in failing) for name in codes}


def test_what_a_command_writes_is_written(folder: Path) -> None:
    assert "<html" in (folder / "preview.html").read_text()
    assert "<html" in (folder / "report.html").read_text()
    assert len(read_lines(folder / "clean.jsonl")) == 2
    assert len(read_lines(folder / "a.jsonl")) == 7 and (folder / "a.scores.json").is_file()


def test_nobody_is_told_of_the_reader(folder: Path) -> None:
    assert "pipe" not in (folder / "stderr-0").read_text().lower()
