"""The file of answers, as LLaVA's `model_vqa_loader.py` writes it, so that its scripts read ours.

    {"question_id": 7, "prompt": "What is it?", "text": "a dog", "answer_id": "5f1c", "model_id": "m", "metadata": {}}

`metadata` says what the answer was computed from. An interrupted evaluation goes on from what stands in the file, and
only where that is the same: answers of two models in one file would be a score of neither. With several ranks each
appends to a part of its own beside the file; parts are put together whenever the evaluation starts or ends. A file
belongs to one evaluation at a time: putting together loses what another appends meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava_train.errors import UserError
from llava_train.files import file_facts, write_durably
from llava_train.model.weights import ADAPTER_FOLDER, RESULT_FOLDER
from llava_train.use.questions import Item

PREFIX = "answers-"
"""Of the names of the files that an evaluation leaves, if nobody names them."""
SCORES_SUFFIX = ".scores.json"
_OF_A_MODEL = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
"""Suffixes of weights, configurations, tokenizers, templates and code."""


class AnswersError(UserError):
    """The file holds other answers, or no answers. The message names it and the mend."""


@dataclass(frozen=True)
class Answer:
    """What the model said; for a choice the most likely option, and the sums of log-probabilities of all."""

    text: str
    log_likelihoods: tuple[float, ...] = ()


class AnswersFile:
    """Answers to `items`, by their index.

    Args:
        origin: what the answers depend on: `model`, `questions` and the settings.
        places: where questions and pictures are, kept to say what differs; files may move.
    """

    def __init__(
        self,
        path: Path,
        items: Sequence[Item],
        model_id: str,
        origin: Mapping[str, Any],
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.items, self.model_id, self.origin = path, items, model_id, dict(origin)
        self.places = dict(places or {})
        told = json.dumps(self.origin, sort_keys=True)
        ids = (hashlib.sha256(f"{told}\n{index}".encode()).hexdigest()[:22] for index in range(len(items)))
        self._indices = {answer_id: index for index, answer_id in enumerate(ids)}
        self._ids = list(self._indices)

    def part(self, rank: int, n_ranks: int) -> Path:
        """The file that a rank appends to."""
        return self.path if n_ranks == 1 else self.path.with_name(f"{self.path.name}.rank{rank}")

    def append(self, part: Path, answers: Mapping[int, Answer]) -> None:
        """Adds answers at the end, in one write."""
        with part.open("a", encoding="utf-8") as file:
            file.write("".join(self._line(index, answer) for index, answer in answers.items()))

    def merge(self) -> dict[int, Answer]:
        """Puts the parts together, in the order of the questions, and drops a line that was cut off; the answers.

        Only rank 0 may call it, while no rank appends.

        Raises:
            AnswersError: a file that holds answers of another model, to other questions, or with other settings.
        """
        found: dict[int, Answer] = {}
        paths = [path for path in (self.path, *self._parts()) if path.is_file()]
        for path in paths:
            found.update(self._read(path))
        if paths:
            write_durably(self.path, "".join(self._line(index, found[index]) for index in sorted(found)))
        for path in self._parts():
            path.unlink()
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other evaluations out. The lock file stays, but the lock ends with the process, however that ends.

        Raises:
            AnswersError: another evaluation has the file.
        """
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise AnswersError(
                f"{self.path}: another evaluation writes it; wait for that one, or name another file (--answers)"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def set_aside(self) -> None:
        """Renames the file and its parts: NAME.bak, NAME.bak.rank0."""
        for path in (self.path, *self._parts()):
            if path.is_file():
                path.replace(path.with_name(f"{self.path.name}.bak{path.name.removeprefix(self.path.name)}"))

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.path.parent.iterdir() if path.name.startswith(f"{self.path.name}.rank"))

    def _line(self, index: int, answer: Answer) -> str:
        metadata = {**self.origin, **self.places}
        if answer.log_likelihoods:
            metadata["log_likelihoods"] = answer.log_likelihoods
        record = {
            "question_id": self.items[index].id,
            "prompt": self.items[index].prompt,
            "text": answer.text,
            "answer_id": self._ids[index],
            "model_id": self.model_id,
            "metadata": metadata,
        }
        return json.dumps(record, ensure_ascii=False) + "\n"

    def _read(self, path: Path) -> dict[int, Answer]:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]  # what follows the last was cut off
        found = {}
        for number, line in enumerate(lines, start=1):
            strange = AnswersError(f"{path}:{number}: not an answer of `llava-train evaluate`; {_MEND}")
            try:
                record = json.loads(line)
                origin, text = dict(record["metadata"]), str(record["text"])
                index = self._indices.get(record["answer_id"])
                likelihoods = tuple(origin.pop("log_likelihoods", ()))
            except (ValueError, TypeError, KeyError) as error:
                raise strange from error
            self._check(path, origin, record.get("model_id"))
            if index is None or len(likelihoods) != len(self.items[index].options):
                raise strange
            found[index] = Answer(text, likelihoods)
        return found

    def _check(self, path: Path, origin: dict[str, Any], model_id: Any) -> None:
        """Refuses answers of another origin, with every setting that differs. Raises AnswersError."""
        compared = {key: value for key, value in origin.items() if key not in _PLACES}
        if compared == self.origin:
            return
        lines = "".join(f"  {line}\n" for line in self._differences(origin, model_id))
        raise AnswersError(f"{path} holds answers of another evaluation:\n{lines}{_MEND}")

    def _differences(self, origin: Mapping[str, Any], model_id: Any) -> Iterator[str]:
        """Yields a line for each setting that differs; of files, where only their checksums do, that they changed."""
        keys = [key for key in {**origin, **self.origin} if origin.get(key) != self.origin.get(key)]
        for key in keys:
            if key == "questions":
                yield from self._other_questions(origin)
            elif key == "model":
                other = model_id != self.model_id
                yield f"model: {model_id} there, {self.model_id} here" if other else "model: its files have changed"
            elif key not in _PLACES:
                yield f"{key}: {_shown(origin, key)} there, {_shown(self.origin, key)} here"

    def _other_questions(self, origin: Mapping[str, Any]) -> Iterator[str]:
        """Yields what may make the questions others: their file or their pictures, else what stands in the file."""
        places = [key for key in _PLACES if key in origin and origin[key] != self.places.get(key)]
        yield from (f"{key}: {origin[key]!r} there, {self.places.get(key)!r} here" for key in places)
        if not places and origin.get("prompt_suffix") == self.origin.get("prompt_suffix"):
            unknown = "" if any(key in origin for key in _PLACES) else ", or the places of their pictures,"
            yield f"questions: their texts, ids or pictures{unknown} have changed"


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return f"{settings[key]!r}" if key in settings else "none"


_PLACES = ("data", "images")
_MEND = "name another file (--answers), or replace it (--overwrite)"


def digest_of_model(name: str, other: Collection[Path] = ()) -> str:
    """Changes with any file of the model that a folder holds; of a hub id it is the id.

    Args:
        other: files that are none of the model's, wherever they are.
    """
    folder = Path(name) / RESULT_FOLDER if (Path(name) / RESULT_FOLDER).is_dir() else Path(name)
    if not folder.is_dir():
        return _digest([name])
    others = {path.absolute() for path in other}
    found = [*folder.iterdir(), *(folder / ADAPTER_FOLDER).glob("*")]
    files = [path for path in found if _is_of_a_model(path) and path.absolute() not in others]
    return _digest([f"{path.relative_to(folder)} {file_facts(path)}" for path in sorted(files)])


def _is_of_a_model(path: Path) -> bool:
    is_ours = path.name.startswith(PREFIX) or path.name.endswith(SCORES_SUFFIX)
    return path.suffix in _OF_A_MODEL and not is_ours and path.is_file()


def digest_of_questions(items: Sequence[Item]) -> str:
    """Changes with what is asked, and with the names of the pictures."""
    return _digest(repr((item.id, item.turns, list(map(str, item.pictures)), item.options)) for item in items)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:16]
