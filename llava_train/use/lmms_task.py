"""A file of questions as a task that lmms-eval runs.

TASKS/NAME/NAME.yaml         what lmms-eval reads
           lmms_functions.py   what it calls
           questions.jsonl     a question a line, its pictures by path
           images/             pictures that lie in an archive or in the records
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llava_train.data.images import open_image
from llava_train.data.pictures import Picture, PictureFile
from llava_train.data.samples import IMAGE_PLACEHOLDER, Sample, parse_record
from llava_train.data.sources import open_source
from llava_train.errors import UserError
from llava_train.use import lmms_functions


class TaskError(UserError):
    """A file of questions that cannot become a task. The message names the file, the record and the mend."""


def write_task(questions: Path, images: Path | None, tasks: Path) -> str:
    """Writes a task that asks the questions of a file, and scores exact matches; returns its name.

    Args:
        questions: original LLaVA questions (`{"question_id", "image", "text", "answer"}`), or training data of any
            shape; of a conversation each question is asked on its own, with all its pictures.
        images: folder or archive of the pictures; None for the folder of `questions`.
        tasks: folder of tasks, lmms-eval's `--include_path`.

    Raises:
        TaskError: a question without a picture or an answer, or an unreadable picture.
        DataError: an unreadable file.
    """
    name = "local_" + re.sub(r"\W", "_", questions.name.split(".")[0])
    folder = tasks / name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    source = open_source(questions, images)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for i in range(len(source)):
            try:
                sample = parse_record(_as_training_record(source.records[i]), source.pictures, str(i))
                for question in _questions_of(sample, folder / "images"):
                    file.write(json.dumps(question) + "\n")
            except UserError as error:
                line = source.line(i)
                where = f"record {i}" if line is None else f"line {line}"
                raise TaskError(f"{questions}, {where}: {error}; mend or leave out that record") from error
    shutil.copy(lmms_functions.__file__, folder)
    (folder / f"{name}.yaml").write_text(_task_yaml(name), encoding="utf-8")
    return name


def _as_training_record(record: Any) -> Any:
    """The record, an original LLaVA question made into a conversation. Raises TaskError."""
    if not isinstance(record, dict) or "text" not in record or "conversations" in record:
        return record
    if record.get("answer") is None:
        raise TaskError('the question has no "answer" to compare with')
    text = str(record["text"])
    if IMAGE_PLACEHOLDER not in text and record.get("image"):
        text = f"{IMAGE_PLACEHOLDER}\n{text}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": str(record["answer"])}]
    return {"id": record.get("question_id"), "image": record.get("image"), "conversations": turns}


def _questions_of(sample: Sample, images: Path) -> Iterator[dict[str, Any]]:
    """The questions of a conversation, in the form that `lmms_functions` reads. Raises UserError."""
    if not sample.images:  # it takes the error of transformers for an empty answer
        raise TaskError("a question without a picture, which lmms-eval's llava_hf cannot ask")
    if sample.turns[0].role == "system":
        raise TaskError("a system turn, which lmms-eval's llava_hf does not hand on")
    paths = [_path_of(picture, images) for picture in sample.images]
    for number, (asked, answered) in enumerate(zip(sample.turns[::2], sample.turns[1::2], strict=True)):
        text = asked.text
        if text.count(IMAGE_PLACEHOLDER) != len(paths):  # a later question, about the pictures of the first
            text = f"{IMAGE_PLACEHOLDER}\n" * len(paths) + text.replace(IMAGE_PLACEHOLDER, "").strip()
        yield {"id": f"{sample.id}/{number}", "question": text, "answer": answered.text, "images": paths}


def _path_of(picture: Picture, folder: Path) -> str:
    """A path of the picture, after a look at its header; one that is no file is written into `folder`."""
    with open_image(picture):
        if isinstance(picture, PictureFile):
            return str(picture.path.absolute())
    folder.mkdir(exist_ok=True)
    path = folder / str(len(list(folder.iterdir())))
    with picture.open("rb") as file:
        path.write_bytes(file.read())
    return str(path.absolute())


def _task_yaml(name: str) -> str:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 128, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    called = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    calls = [f"{name}: !function lmms_functions.{name}" for name in called]
    return yaml.safe_dump(task, sort_keys=False) + "\n".join(calls) + "\n"
