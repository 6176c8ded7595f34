"""Writes the samples of a stage that can be trained on as JSONL, one file a source.

Nothing that is there is lost before the new files are whole: they are written aside and renamed in the end, and
pictures have names of their content. What JSON has no word for is written as text (dates, decimals), or left out and
counted (binary values that are no pictures of the sample, numbers that are not finite).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from llava_train.config import SourceSection, StageConfig
from llava_train.data.formats.keys import IMAGE_KEYS
from llava_train.data.images import open_image, stored_bytes
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.data.problems import DataError, SampleError
from llava_train.data.records import JsonRecords
from llava_train.data.sources import Source
from llava_train.files import written_aside
from llava_train.inspect.check import Checked, Examined
from llava_train.inspect.opening import StageData

_WITH_PICTURES = (*IMAGE_KEYS, "messages", "conversations")
"""Keys of a record that may hold pictures."""
_LEFT_OUT = object()
"""Stands for a value that is not written."""


@dataclass(frozen=True)
class Cleaned:
    """What was written of one source."""

    path: Path
    section: dict[str, Any]
    """What to write below `data:` in the stage file to train on it; empty where no sample could be written."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of values that JSON cannot hold, by what they are."""

    def notes(self) -> list[str]:
        """What is to be said of the file."""
        if not self.section:
            return [f"{self.path} is not written: no sample of its source can be trained on"]
        return [f"{self.path} is without {n:,} {what}: JSON cannot hold them" for what, n in self.left_out.items()]


def clean_files(config: StageConfig, data: StageData, out: Path) -> list[Path]:
    """The file of each source: `out`, or with several sources `OUT.NAME.jsonl`. Their folder is made.

    Raises:
        DataError: it is a folder, or one of the files that the stage reads, or it would become a part of the data.
        OSError: the folder cannot be made or written to.
    """
    names = [re.sub(r"[^\w.-]", "-", source.name) for source in data.mixture.sources]
    files = [out] if len(names) == 1 else [out.with_name(f"{out.stem}.{name}{out.suffix}") for name in names]
    sections = [*config.data, *(config.eval.data if config.eval else [])]
    data_paths = {Path(section.path).resolve() for section in sections}
    archives = {Path(path).resolve() for section in sections for path in _images_in(section)}
    if config.eval and config.eval.questions:
        data_paths.add(Path(config.eval.questions.path).resolve())
    for file in files:
        if file.is_dir():
            raise DataError(f"{file}: a folder; name the file to write")
        target = file.resolve()
        if target in data_paths | archives:
            raise DataError(f"{file}: a source of the stage; write the clean records to another file")
        if inside := data_paths.intersection(target.parents):
            raise DataError(f"{file}: lies in {inside.pop()}, a source of the stage; write it to another folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.parent))
    return files


def _images_in(section: SourceSection) -> list[str]:
    images = section.images
    return list(images.values()) if isinstance(images, dict) else [images] if images else []


def write_clean(config: StageConfig, data: StageData, checked: Checked, files: list[Path]) -> list[Cleaned]:
    """Writes the good records as they are; pictures that a record holds itself become files beside the JSONL.

    A source without a good record is not written: an empty file is no data, and would replace what is there.

    Args:
        files: as `clean_files` gives them.

    Raises:
        OSError: a file cannot be written; then all files are as they were.
    """
    cleaned = []
    with ExitStack() as stack:
        for section, source, examined, path in zip(
            config.data, data.mixture.sources, checked.by_source, files, strict=True
        ):
            if not any(examined.n_tokens):
                cleaned.append(Cleaned(path, {}))
                continue
            cleaned.append(_write_source(section, source, examined, path, stack.enter_context(written_aside(path))))
    return cleaned


def _write_source(section: SourceSection, source: Source, examined: Examined, path: Path, file: IO[str]) -> Cleaned:
    is_json = isinstance(source.records, JsonRecords)
    writer = _RecordWriter(path, drops_nulls=not is_json)
    for index, n_tokens in zip(examined.indices, examined.n_tokens, strict=True):
        if n_tokens:
            file.write(writer.as_line(source.records[index], f"{index:08}") + "\n")
    images = _images_of(section, path, writer.n_pictures > 0)
    return Cleaned(path, {"path": str(path), **({"images": images} if images else {})}, writer.left_out)


def _images_of(section: SourceSection, path: Path, has_files: bool) -> str | dict[str, str] | None:
    """Where the pictures of the clean records are: where they were, and beside the file where they were in records."""
    images = section.images
    if images is None and Path(section.path).exists():  # no id of the hub
        images = section.path if Path(section.path).is_dir() else str(Path(section.path).parent)
    if not has_files or images is None:
        return images
    folder = _folder_of(path)
    return {**(images if isinstance(images, dict) else {"": images}), folder.name: str(folder)}


def _folder_of(path: Path) -> Path:
    """The folder of the pictures beside a clean file."""
    return path.with_name(f"{path.stem}-images")


class _RecordWriter:
    """Turns records into what JSON can hold.

    Args:
        path: of the file that they are written to.
        drops_nulls: a row of Arrow has all columns, a record of JSON the keys that somebody wrote.
    """

    def __init__(self, path: Path, drops_nulls: bool) -> None:
        self.path, self.drops_nulls = path, drops_nulls
        self.left_out: Counter[str] = Counter()
        self.n_pictures = 0

    def as_line(self, record: dict[str, Any], stem: str) -> str:
        """A record in a line; `stem` begins the names of its pictures' files."""
        if not self.drops_nulls:  # it came from JSON
            with suppress(ValueError):  # numbers that are not finite
                return json.dumps(record, ensure_ascii=False, allow_nan=False)
        written = {
            key: self._value(value, key, stem, key in _WITH_PICTURES)
            for key, value in record.items()
            if value is not None or not self.drops_nulls
        }
        return json.dumps(_without_left_out(written), ensure_ascii=False, allow_nan=False)

    def _value(self, value: Any, key: str, stem: str, has_pictures: bool) -> Any:
        """What JSON has for a value below a key, or `_LEFT_OUT`."""
        if value is None or isinstance(value, str | int):
            return value
        if isinstance(value, float):
            if math.isfinite(value):
                return value
            self._left_out(key, "numbers that are not finite")
            return None  # a list keeps its length
        if isinstance(value, bytes | pa.Buffer) or (
            isinstance(value, dict) and isinstance(value.get("bytes"), bytes | pa.Buffer) and "type" not in value
        ):
            name = self._as_file(value, stem) if has_pictures else None
            return name or self._left_out(key, "binary values")
        if isinstance(value, dict):
            inner = {name: self._value(each, key, stem, has_pictures) for name, each in value.items()}
            return {name: each for name, each in inner.items() if each is not None or not self.drops_nulls}
        if isinstance(value, list | tuple):
            return [self._value(each, key, f"{stem}-{number}", has_pictures) for number, each in enumerate(value)]
        if hasattr(value, "tolist"):  # of numpy
            return self._value(value.tolist(), key, stem, has_pictures)
        return str(value)  # dates, decimals: as `record_id` has them, so that ids stay

    def _left_out(self, key: str, what: str) -> object:
        self.left_out[f"{what} of {key!r}"] += 1
        return _LEFT_OUT

    def _as_file(self, value: Any, stem: str) -> str | None:
        """The path of a picture's file, relative to the folder of the JSONL; None for what is no picture."""
        picture = Pictures(PictureFolder(Path())).picture(value)
        try:
            with open_image(picture) as image:
                suffix = (image.format or "img").lower()
        except SampleError:
            return None
        content = stored_bytes(picture)
        folder = _folder_of(self.path)
        name = f"{stem}-{hashlib.sha256(content).hexdigest()[:12]}.{suffix}"  # it replaces no other picture
        with written_aside(folder / name, "wb", durably=False) as file:
            file.write(content)
        self.n_pictures += 1
        return f"{folder.name}/{name}"


def _without_left_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_left_out(inner) for key, inner in value.items() if inner is not _LEFT_OUT}
    if isinstance(value, list):
        return [_without_left_out(inner) for inner in value if inner is not _LEFT_OUT]
    return value
