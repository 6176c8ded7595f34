"""A file of questions, and the command that measures a model by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from typer.testing import CliRunner, Result

from llava_train.cli import app

N = 7


def write_pope(folder: Path) -> Path:
    """Seven questions about four pictures, as POPE has them."""
    rows = []
    for number in range(N):
        image = f"images/{number // 2}.png"
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (30 + number, 40), (40 * number, 90, 20)).save(folder / image)
        label, category = ("yes", "random") if number % 3 else ("no", "popular")
        text = "Is there a " + "very " * number + "red ball?"
        rows.append({"question_id": 100 + number, "image": image, "text": text, "label": label, "category": category})
    return write(folder / "pope.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, data: Path, *more: str, metric: str = "pope") -> list[str]:
    settings = ["--metric", metric, "--max-new-tokens", "5", "--batch-size", "2"]
    return ["evaluate", str(model), "--data", str(data), *settings, "--answers", str(data.parent / "a.jsonl"), *more]


def run(model: Path, data: Path, *more: str, metric: str = "pope") -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, command(model, data, *more, metric=metric))
