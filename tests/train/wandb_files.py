"""Reads what wandb wrote into a run's folder: its records are in a log file of LevelDB's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7
_LAST_PARTS = (1, 4)
"""Of the kinds of a part: whole, first, middle, last."""


@dataclass
class WandbFile:
    """What one start of a run sent, or keeps to send."""

    folder: Path
    run_id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the history, without wandb's own keys."""
    step_metrics: dict[str, str] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    """The files of a table's pictures."""
    exit_code: int | None = None


def read_wandb(path: Path) -> WandbFile:
    found = WandbFile(path.parent)
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run_id, found.project = record.run.run_id, record.run.project
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.rows.append({key: value for key, value in row.items() if not key.startswith("_")})
        elif kind == "metric":
            found.step_metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
        elif kind == "artifact":
            entries = record.artifact.manifest.contents
            found.pictures += [Path(entry.local_path) for entry in entries if "images" in entry.path]
    return found


def _records(path: Path) -> Iterator[Record]:
    content, at, parts = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # the end of a block, too short for a header
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in _LAST_PARTS:
            yield Record.FromString(parts)
            parts = b""
