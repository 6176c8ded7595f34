"""A file of questions as a task that lmms-eval runs.

TASKS/NAME/NAME.yaml         what lmms-eval reads
           lmms_functions.py   what it calls
           questions.jsonl     a question a line, its pictures by path
           images/             pictures that lie in an archive or in the records, and those that Pillow's own
                               conversion would show otherwise than training does, as PNG
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from llava_train.data.images import decode_image, open_image
from llava_train.data.pictures import Picture, PictureFile
from llava_train.data.rgb import has_transparency
from llava_train.errors import UserError
from llava_train.files import folder_written_aside
from llava_train.use import lmms_functions
from llava_train.use.questions import Item, read_questions


class TaskError(UserError):
    """A file of questions that cannot become a task. The message names the file, the record and the mend."""


def write_task(questions: Path, images: Path | None, tasks: Path) -> str:
    """Writes a task that asks the questions of a file, and scores exact matches; returns its name.

    Args:
        questions: as `read_questions` takes them.
        images: folder or archive of the pictures; None for the folder of `questions`.
        tasks: folder of tasks, lmms-eval's `--include_path`.

    Raises:
        TaskError: a question that lmms-eval cannot ask, or an unreadable picture.
        DataError, QuestionError: an unreadable file, a record that is no question or has no answer.
    """
    name = "local_" + re.sub(r"\W", "_", questions.name.split(".")[0])
    items = read_questions(questions, "exact", str(images) if images else None)
    with folder_written_aside(tasks / name) as folder:
        with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
            for item in items:
                try:
                    file.write(json.dumps(_question_of(item, folder / "images", tasks / name / "images")) + "\n")
                except UserError as error:
                    raise TaskError(f"{item.where}: {error}; mend or leave out that record") from error
        shutil.copy(lmms_functions.__file__, folder)
        (folder / f"{name}.yaml").write_text(_task_yaml(name), encoding="utf-8")
    return name


def _question_of(item: Item, images: Path, later: Path) -> dict[str, Any]:
    """A question in the form that `lmms_functions` reads; `images` and `later` as in `_path_of`. Raises UserError."""
    if not item.pictures:  # it takes the error of transformers for an empty answer
        raise TaskError("a question without a picture, which lmms-eval's llava_hf cannot ask")
    if len(item.turns) > 1:
        raise TaskError("a system turn, which lmms-eval's llava_hf does not hand on")
    paths = [_path_of(picture, images, later) for picture in item.pictures]
    return {
        "id": str(item.id),
        "question": item.turns[-1].text,
        "answers": list(item.references),
        "images": paths,
    }


def _path_of(picture: Picture, folder: Path, later: Path) -> str:
    """Return a path of the picture, after a look at its header.

    One that is no file is written into a folder, and so is, decoded, one that `lmms_functions` would show otherwise
    than training does: with transparency, 16 bits, or in a format that the environment of lmms-eval may not read.

    Args:
        folder: where it is written now.
        later: where that folder will be.
    """
    with open_image(picture) as image:
        is_plain = image.mode in ("RGB", "L", "1") and not has_transparency(image) and image.format != "AVIF"
    if is_plain and isinstance(picture, PictureFile):
        return str(picture.path.absolute())
    folder.mkdir(exist_ok=True)
    path = folder / str(len(list(folder.iterdir())))
    if is_plain:
        with picture.open("rb") as file:
            path.write_bytes(file.read())
    else:
        decode_image(picture).save(path, "PNG")
    return str(later.absolute() / path.name)


def _task_yaml(name: str) -> str:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answers",
        "generation_kwargs": {"max_new_tokens": 128, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    called = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    calls = [f"{name}: !function lmms_functions.{name}" for name in called]
    return yaml.safe_dump(task, sort_keys=False) + "\n".join(calls) + "\n"
