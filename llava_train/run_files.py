"""The files that a run leaves in its folder, and how its records are read. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_train.data.problems import KINDS

METRICS_FILE = "metrics.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
BAD_STEPS_FILE = "bad_steps.jsonl"
ANSWERS_FILE = "answers.jsonl"
RECORD_FILES = (METRICS_FILE, QUARANTINE_FILE, BAD_STEPS_FILE, ANSWERS_FILE)
PICTURES_FOLDER = "pictures"
"""Of the questions in answers.jsonl, small."""
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
WANDB_ID_FILE = "wandb_run.json"
"""Which run of wandb a run folder is."""
REPORT_FILE = "report.html"
ERRORS_FOLDER = "errors"
"""Full tracebacks of failures that were told in a few lines."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none if it is missing; a line that was cut off is left out."""
    text, found = path.read_text(encoding="utf-8") if path.is_file() else "", []
    for line in text.split("\n"):  # a text may hold other line ends
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def quarantine_summary(path: Path) -> str:
    """How many samples of each kind stand in a quarantine file, the most frequent first."""
    counts = Counter(record["kind"] for record in read_records(path)).most_common()
    return ", ".join(f"{count} x {KINDS[kind]}" for kind, count in counts)
