"""Writes the samples of a stage that can be trained on as JSONL, one file a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava_train.data.images import open_image
from llava_train.data.pictures import EmbeddedPicture, PictureFolder, Pictures
from llava_train.data.problems import DataError
from llava_train.inspect.check import Checked
from llava_train.inspect.opening import StageData


def write_clean(data: StageData, checked: Checked, out: Path) -> dict[str, Path]:
    """Writes the good records as they are; pictures that a record holds itself become files beside the JSONL.

    Args:
        out: the file; with several sources, `NAME` is put before its last suffix: `clean.NAME.jsonl`.

    Returns:
        The file of each source by its name.

    Raises:
        DataError: the file is a source itself.
    """
    written = {}
    for source, examined in zip(data.mixture.sources, checked.by_source, strict=True):
        path = out if len(data.mixture.sources) == 1 else out.with_suffix(f".{source.name}{out.suffix}")
        if path.resolve() in {Path(other.path).resolve() for other in data.mixture.sources}:
            raise DataError(f"{path}: a source of the stage; write the clean records to another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a character: its JSON escape
            for index, n_tokens in zip(examined.indices, examined.n_tokens, strict=True):
                if n_tokens:
                    record = _with_files(source.records[index], path, f"{index:08}")
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        written[source.name] = path
    return written


def _with_files(value: Any, path: Path, stem: str) -> Any:
    """A record whose embedded pictures are files in the folder of `path`, by relative path."""
    if isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes)):
        return _as_file(value, path, stem)
    if isinstance(value, dict):
        return {key: _with_files(inner, path, f"{stem}-{key}") for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_with_files(inner, path, f"{stem}-{number}") for number, inner in enumerate(value)]
    return value


def _as_file(value: Any, path: Path, stem: str) -> str:
    picture = Pictures(PictureFolder(Path())).picture(value)
    assert isinstance(picture, EmbeddedPicture)
    with open_image(picture) as image:
        suffix = _suffix(image)
    name = Path(f"{path.stem}-images") / f"{stem}{suffix}"
    (path.parent / name).parent.mkdir(exist_ok=True)
    (path.parent / name).write_bytes(picture.content)
    return str(name)


def _suffix(image: Image.Image) -> str:
    return f".{(image.format or 'img').lower()}"
