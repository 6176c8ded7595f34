"""What a run left in its folder, as far as it can be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_train.errors import UserError
from llava_train.files import read_manifest
from llava_train.run_files import ANSWERS_FILE, BAD_STEPS_FILE, METRICS_FILE, QUARANTINE_FILE, RESULT_FOLDER
from llava_train.stage_file import RUN_CARD

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

Line = dict[str, Any]
"""A record of one of the run's JSONL files."""


class ReportError(UserError):
    """A folder of which no report can be made."""


@dataclass(frozen=True)
class RunRecord:
    """The files of a run. Lines are in order of their steps; `notes` says what could not be read."""

    folder: Path
    name: str
    config: dict[str, Any]
    """The resolved stage file."""
    about: dict[str, Any]
    """Versions, commit, data: what config.yaml says beside the stage file."""
    training: tuple[Line, ...]
    """Lines of metrics.jsonl about steps."""
    evaluations: tuple[Line, ...]
    """Lines of metrics.jsonl with keys `eval_*`."""
    answers: tuple[Line, ...]
    quarantine: tuple[Line, ...]
    bad_steps: tuple[Line, ...]
    complete: bool
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps done, as far as they are logged."""
        return int(self.training[-1]["step"]) if self.training else 0

    @property
    def n_steps(self) -> int | None:
        """Steps of the stage, by the time left; None where no line tells."""
        for line in reversed(self.training):
            left_s, step_s = number(line.get("time_left_s")), number(line.get("step_s"))
            if left_s is not None and step_s:
                return int(line["step"]) + round(left_s / step_s)
        return None


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder, also while the run goes on.

    Raises:
        ReportError: it is no run, or has logged no step and no evaluation yet.
    """
    if not (folder / METRICS_FILE).is_file() and not (folder / RUN_CARD).is_file():
        raise ReportError(f"{folder}: no run folder, for it has neither {METRICS_FILE} nor {RUN_CARD}")
    notes: list[str] = []
    card = _read_card(folder / RUN_CARD, notes)
    metrics, answers, quarantine, bad_steps = (
        _read_lines(folder / name, notes) for name in (METRICS_FILE, ANSWERS_FILE, QUARANTINE_FILE, BAD_STEPS_FILE)
    )
    if not metrics:
        raise ReportError(f"{folder}: {METRICS_FILE} has no line yet; a run writes one when its first step is done")
    about = card.pop("about", None)
    return RunRecord(
        folder=folder,
        name=str(card.get("name") or folder.name),
        config=card,
        about=about if isinstance(about, dict) else {},
        training=tuple(line for line in metrics if "eval_loss" not in line),
        evaluations=tuple(line for line in metrics if "eval_loss" in line),
        answers=tuple(answers),
        quarantine=tuple(quarantine),
        bad_steps=tuple(bad_steps),
        complete=read_manifest(folder / RESULT_FOLDER) is not None,
        notes=tuple(notes),
    )


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if type(value) is float:  # no more than this is asked of most numbers, of which there are very many
        return value if math.isfinite(value) else None
    with suppress(OverflowError):  # of a whole number with hundreds of digits
        return float(value) if type(value) is int else None
    return None


def table_of(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else that a file may hold."""
    return value if isinstance(value, dict) else {}


def list_of(value: Any) -> list[Any]:
    """A JSON list, or an empty one for anything else that a file may hold."""
    return value if isinstance(value, list) else []


def text_of(value: Any, most: int = 2000) -> str:
    """A text of a file without control characters, cut where it is long."""
    text = str(value if value is not None else "")
    return _CONTROL.sub("\ufffd", text if len(text) <= most else text[:most] + " …")


def _read_card(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        card = None
    if not isinstance(card, dict):
        notes.append(f"{path.name} is missing or cannot be read.")
        return {}
    return card


def _read_lines(path: Path, notes: list[str]) -> list[Line]:
    """The records of a file, by step; none if it is missing."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.split("\n") if line]  # a text may hold other line ends
    found = sorted(_parsed(lines), key=lambda record: record["step"])
    if n_broken := len(lines) - len(found):
        notes.append(f"{n_broken} of {len(lines)} lines of {path.name} cannot be read, and are left out.")
    return found


def _parsed(lines: list[str]) -> Iterator[Line]:
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and number(record.get("step")) is not None:
            yield record
