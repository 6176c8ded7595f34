"""What to say of a file or folder that was named as a model and is none."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import yaml

from llava_train.file_kinds import FileKind, kind_of_file
from llava_train.run_files import METRICS_FILE, RESULT_FOLDER

_N_LOOKED_AT = 50
"""Files of a folder."""
_DATA = ("a JSON file", "a CSV table", "a TSV table", "a Parquet file", "an Arrow file")
_BESIDE_DATA = ("a text", "a gzip file", "a ZIP archive", "a TAR archive")
_CHECKPOINT = re.compile(r"step-\d+")


def what_to_name(file: Path, kind: FileKind) -> str:
    """Return what to name in place of a file that is no model."""
    if kind.words == "a stage file":
        with suppress(OSError, ValueError, AttributeError, KeyError, yaml.YAMLError):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            return f"name the run that it trains, {Path(content.get('output', 'runs')) / content['name']}"
        return "name the run that it trains (its `output`/`name`)"
    if kind.words.startswith("a Git LFS"):
        return "get the file itself: git lfs pull"
    if kind.words.startswith("an HTML"):
        return "download the file again"
    return "the model comes first: name a run, a folder with a model, or a hub id"


def not_a_model(folder: Path, understood: str) -> str:
    """Return the message about a folder without a model: what it holds, and what to name where that is clear."""
    files = sorted(folder.iterdir())
    names = [file.name for file in files]
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    holds = f"{folder} holds {listed or 'nothing'}"
    if _CHECKPOINT.fullmatch(folder.name) or (names and all(_CHECKPOINT.fullmatch(name) for name in names)):
        run = folder.absolute().parents[1 if _CHECKPOINT.fullmatch(folder.name) else 0]
        return (
            f"{holds}: checkpoints, from which a run continues, and no model; the same `llava-train train` command "
            f"finishes the run and writes {run / RESULT_FOLDER}: name {run} then"
        )
    if (folder / METRICS_FILE).is_file():
        return f"{holds}: a run without a model, which it writes when it has ended; start its stage again"
    if runs := [file.name for file in files if (file / METRICS_FILE).is_file()]:
        return f"{holds}: runs; name one of them, such as {folder / runs[0]}"
    if alone := _part_alone(folder):
        return f"{holds}: {alone}, not a LLaVA; train a projector for it, or name a run; understood are: {understood}"
    shown = [file for file in files if not file.name.startswith(".")][:_N_LOOKED_AT]
    kinds = [kind for file in shown if file.is_file() and (kind := _kind_of(file))]
    if any(kind.is_picture or kind.words in _DATA for kind in kinds) and all(
        kind.is_picture or kind.words in (*_DATA, *_BESIDE_DATA) for kind in kinds
    ):
        return f"{holds}: data, no model; name a run, a folder with a model, or a hub id"
    return f"{holds}; understood are: {understood}"


def _kind_of(file: Path) -> FileKind | None:
    with suppress(OSError):
        return kind_of_file(file)
    return None


def _part_alone(folder: Path) -> str:
    """Return what a model of transformers is that is no LLaVA; empty where there is none."""
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return f"a {content['model_type']} alone" if content.get("model_type", "llava") != "llava" else ""
    return ""
