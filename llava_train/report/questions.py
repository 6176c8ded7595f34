"""Held-out questions with their pictures and what a run answered before and after training."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_train.data.rgb import as_rgb
from llava_train.report.read import Line, RunRecord, list_of, text_of

_PICTURE_PIXELS, _MOST_QUESTIONS = 320, 40
_IMAGE_MARK = "<image>"


@dataclass
class Question:
    """A held-out question and what was answered to it, each answer under the name of its time."""

    prompt: str
    expected: str
    pictures: list[str] = field(default_factory=list)
    """As `data:` addresses."""
    answers: list[tuple[str, str, bool]] = field(default_factory=list)
    """When, or by which run and when; the answer; whether it is the reference to the letter."""


def questions(records: Sequence[RunRecord]) -> tuple[list[Question], int]:
    """Questions with the first and the last answer of each run, and how many more there are."""
    found: dict[tuple[str, ...], Question] = {}
    for record in records:
        asked: dict[tuple[str, ...], list[Line]] = {}
        for line in record.answers:
            # Two sources may have the same ids, and ask the same of every picture.
            asked.setdefault(tuple(str(line.get(key)) for key in ("id", "prompt", "expected")), []).append(line)
        for key, lines in asked.items():
            new = Question(text_of(key[1].replace(_IMAGE_MARK, "").strip()), text_of(lines[-1].get("expected")))
            question = found.setdefault(key, new)
            if len(found) <= _MOST_QUESTIONS:
                question.pictures = question.pictures or list(_pictures(record.folder, lines[-1]))
            for line in lines if len(lines) == 1 else (lines[0], lines[-1]):
                answer, when = text_of(line.get("answer")), _when(line, record)
                is_right = answer.strip().casefold() == question.expected.strip().casefold()
                question.answers.append((when if len(records) == 1 else f"{record.name}, {when}", answer, is_right))
    shown = list(found.values())[:_MOST_QUESTIONS]
    return shown, len(found) - len(shown)


def _when(line: Line, record: RunRecord) -> str:
    if line["step"] == 0:
        return "before training"
    return "after training" if record.complete and line["step"] >= record.step else f"after step {line['step']:,.0f}"


def _pictures(folder: Path, line: Line) -> Iterator[str]:
    """The question's pictures, small; those that are not there or lie outside the run's folder are left out."""
    for name in list_of(line.get("pictures")):
        with suppress(OSError, ValueError, Image.DecompressionBombError):
            path = (folder / str(name)).resolve()
            if not path.is_relative_to(folder.resolve()) or not path.is_file():  # a pipe would keep us waiting
                continue
            with Image.open(path, formats=["JPEG", "PNG"]) as image:
                shown, small = as_rgb(image), io.BytesIO()
                shown.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
                shown.save(small, "JPEG", quality=80)
            yield "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode("ascii")
