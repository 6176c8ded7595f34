"""`Sample`, and the reader of LLaVA's JSON and JSONL.

A record is `{"id", "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human" | "gpt" | "system",
"value": text}, ...]}`; `<image>` in a human text says where an image goes; other keys are ignored. Records are
kept as JSON text in one Arrow array and parsed when a step asks for them: opening a file checks no record,
and worker processes share the array's memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from llava_train.errors import UserError

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(UserError):
    """A sample that cannot be trained on. The message says why; whoever catches it knows which sample."""


class DataError(UserError):
    """A source that cannot be read. The message names the file and the mend."""


@dataclass(frozen=True)
class Turn:
    """One message. `text` holds `<image>` where an image goes."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """A validated conversation: user and assistant take turns, the assistant has the last word.

    `images[i]` is the file of the i-th `<image>` in the turns.
    """

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


class LlavaJson:
    """The samples of one LLaVA JSON or JSONL file, by index.

    Args:
        path: the file; JSON list or one JSON object a line, told from its first character.
        images: folder that image paths are relative to; default: the folder of `path`.

    Raises:
        DataError: the file is missing, empty, or not such a list.
    """

    def __init__(self, path: str | Path, images: str | Path | None = None) -> None:
        self.path = Path(path)
        self.images = Path(images) if images is not None else self.path.parent
        self._records = pa.array(_read_records(self.path), type=pa.large_string())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """Parses and validates a sample. Raises SampleError."""
        return parse_record(json.loads(self._records[index].as_py()), self.images, default_id=str(index))

    def record_id(self, index: int) -> str:
        """The id that the record states, valid or not."""
        record = json.loads(self._records[index].as_py())
        return str(record.get("id", index)) if isinstance(record, dict) else str(index)


class Mixture:
    """Several sources end to end: sample `i` is counted over all of them."""

    def __init__(self, sources: Sequence[LlavaJson]) -> None:
        self.sources = tuple(sources)
        self._ends: list[int] = []
        for source in self.sources:
            self._ends.append(len(source) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[LlavaJson, int]:
        """The source that holds sample `index`, and the sample's index there."""
        start = 0
        for source, end in zip(self.sources, self._ends, strict=True):
            if index < end:
                return source, index - start
            start = end
        raise IndexError(index)

    def __getitem__(self, index: int) -> Sample:
        source, local = self.locate(index)
        return source[local]


def parse_record(record: Any, images_root: Path, default_id: str) -> Sample:
    """A LLaVA record as a Sample. Texts lose surrounding white space. Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError(f"a record is a JSON object, not {type(record).__name__}")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise SampleError('"conversations" is missing, empty or not a list')
    turns = tuple(_parse_turn(message, number) for number, message in enumerate(conversations, start=1))
    _check_order(turns)
    names = record.get("image") or []
    names = names if isinstance(names, list) else [names]
    images = tuple(_inside(images_root, name) for name in names)
    _check_placeholders(turns, len(images))
    return Sample(id=str(record.get("id", default_id)), images=images, turns=turns)


def _parse_turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise SampleError(f'turn {number}: a turn is {{"from": ..., "value": text}}')
    role = _ROLES.get(str(message.get("from")))
    if role is None:
        raise SampleError(f"turn {number}: unknown role {message.get('from')!r}; known: {', '.join(_ROLES)}")
    if _SURROGATE.search(message["value"]):
        raise SampleError(f"turn {number}: the text holds half of a character (a lone UTF-16 surrogate)")
    return Turn(role, message["value"].strip())


def _check_order(turns: tuple[Turn, ...]) -> None:
    spoken = [turn.role for turn in turns]
    if spoken[0] == "system":
        spoken = spoken[1:]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise SampleError(f"roles out of order: {', '.join(spoken)}; wanted user, assistant, user, assistant, ...")


def _check_placeholders(turns: tuple[Turn, ...], n_images: int) -> None:
    n_asked = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role != "user"):
        raise SampleError(f"{IMAGE_PLACEHOLDER} outside a user turn")
    if n_asked != n_images:
        raise SampleError(f"{n_asked} {IMAGE_PLACEHOLDER} placeholders, but {n_images} images")


def _inside(root: Path, name: Any) -> Path:
    """`root / name`, refused when it would leave the root."""
    if not isinstance(name, str) or not name:
        raise SampleError(f'"image" is a relative path or a list of them, not {name!r}')
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SampleError(f"image path {name!r} leaves the image folder")
    return root / name


def _read_records(path: Path) -> list[str]:
    """The records of a file, each as JSON text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the data file: {error.strerror}; mend its path in the stage file, "
            f"which is relative to the current folder ({Path.cwd()})"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    try:
        if text.lstrip()[:1] == "[":
            records = [json.dumps(record) for record in json.loads(text)]
        else:
            records = [line for line in text.split("\n") if line.strip()]
            for number, line in enumerate(records, start=1):
                if not line.lstrip().startswith("{"):
                    raise DataError(f"{path}: record {number} is not a JSON object; wanted a JSON list or JSONL")
                json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not records:
        raise DataError(f"{path}: holds no sample")
    return records
