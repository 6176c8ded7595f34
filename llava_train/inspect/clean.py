"""Writes the samples of a stage that can be trained on as JSONL, one file a source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from llava_train.config import StageConfig
from llava_train.data.images import open_image
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.data.problems import DataError
from llava_train.data.records import JsonRecords
from llava_train.inspect.check import Checked
from llava_train.inspect.opening import StageData

_WITH_PICTURES = ("image", "images", "messages", "conversations")
"""Keys of a record that may hold pictures."""


def clean_files(data: StageData, out: Path) -> list[Path]:
    """The file of each source: `out`, or with several sources `OUT.NAME.jsonl`. Their folder is made.

    Raises:
        DataError: it is a source itself, or a folder.
    """
    names = [re.sub(r"[^\w.-]", "-", source.name) for source in data.mixture.sources]
    files = [out] if len(names) == 1 else [out.with_name(f"{out.stem}.{name}{out.suffix}") for name in names]
    sources = {Path(source.path).resolve() for source in data.mixture.sources}
    for file in files:
        if file.resolve() in sources:
            raise DataError(f"{file}: a source of the stage; write the clean records to another file")
        if file.is_dir():
            raise DataError(f"{file}: a folder; name the file to write")
        file.parent.mkdir(parents=True, exist_ok=True)
    return files


def write_clean(config: StageConfig, data: StageData, checked: Checked, files: list[Path]) -> list[dict[str, Any]]:
    """Writes the good records as they are; pictures that a record holds itself become files beside the JSONL.

    Args:
        files: as `clean_files` gives them.

    Returns:
        What to write as `data:` in the stage file to train on them.
    """
    sections = []
    sources = zip(config.data, data.mixture.sources, checked.by_source, files, strict=True)
    for section, source, examined, path in sources:
        is_json = isinstance(source.records, JsonRecords)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a character: its JSON escape
            for index, n_tokens in zip(examined.indices, examined.n_tokens, strict=True):
                if n_tokens:
                    record = source.records[index]
                    if not is_json:
                        record = _as_json(record, path, f"{index:08}")
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        images = section.images
        if images is None and is_json:
            images = str(Path(section.path).parent)
        sections.append({"path": str(path), **({"images": images} if images else {})})
    return sections


def _as_json(record: dict[str, Any], path: Path, stem: str) -> dict[str, Any]:
    """A row without what is empty; binary values that are no pictures are left out."""
    return {
        key: _with_files(value, path, stem) if key in _WITH_PICTURES else value
        for key, value in record.items()
        if value is not None and not isinstance(value, bytes | pa.Buffer)
    }


def _with_files(value: Any, path: Path, stem: str) -> Any:
    """A value whose embedded pictures are files in the folder of `path`, by relative path."""
    if isinstance(value, bytes | pa.Buffer) or (isinstance(value, dict) and value.get("bytes") is not None):
        return _as_file(value, path, stem)
    if isinstance(value, dict):
        return {key: _with_files(inner, path, stem) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_with_files(inner, path, f"{stem}-{number}") for number, inner in enumerate(value)]
    return value


def _as_file(value: Any, path: Path, stem: str) -> str:
    picture = Pictures(PictureFolder(Path())).picture(value)
    with open_image(picture) as image:
        suffix = (image.format or "img").lower()
    name = Path(f"{path.stem}-images") / f"{stem}.{suffix}"
    (path.parent / name).parent.mkdir(exist_ok=True)
    with picture.open("rb") as file:
        (path.parent / name).write_bytes(file.read())
    return str(name)
