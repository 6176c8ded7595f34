"""Pictures to try a model with, each with a question."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from llava_train.data.images import decode_image
from llava_train.data.mixture import open_mixture
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER
from llava_train.errors import UserError
from llava_train.stage_file import load_run_card

_N_SHOWN = 6
_N_LOOKED_AT = 200
"""Samples of a run's held-out data among which different questions are looked for."""

_DEFAULT_QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Example:
    picture: Image.Image
    question: str


def examples_for(model: str | Path, folder: Path | None = None) -> list[Example]:
    """The pictures of `folder`, or of the model's own held-out data where it is a run that has some, or drawn ones.

    Raises:
        UserError: no picture in `folder`, or one that cannot be read.
    """
    return of_folder(folder) if folder else of_run(Path(model)) or drawn()


def of_folder(folder: Path) -> list[Example]:
    """Its pictures by name; the question about `cat.jpg` stands in `cat.txt`, if there is one. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of example pictures")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    pictures = [path for path in files if path.suffix != ".txt"]
    if not pictures:
        raise UserError(f"{folder} holds no picture")
    return [_of_file(path) for path in pictures]


def _of_file(path: Path) -> Example:
    try:
        picture = decode_image(path)
    except SampleError as error:
        raise UserError(f"{error}; a folder of examples holds pictures and their questions (.txt) only") from error
    text = path.with_suffix(".txt")
    try:
        question = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: not UTF-8; save the question as UTF-8") from error
    return Example(picture, question or _DEFAULT_QUESTION)


def of_run(model: Path) -> list[Example]:
    """Different first questions of a run's held-out data; none where there is no such data on this machine."""
    card = next((path for path in (model / "config.yaml", model.parent / "config.yaml") if path.is_file()), None)
    if card is None:
        return []
    try:
        stage = load_run_card(card.parent)
        sections = stage.eval.data if stage.eval else []
        if not sections or not all(Path(section.path).exists() for section in sections):
            return []
        mixture = open_mixture(sections)
    except (OSError, ValueError):  # UserErrors are ValueErrors
        return []
    found: dict[str, Example] = {}
    for index in range(min(_N_LOOKED_AT, len(mixture))):
        try:
            sample = mixture[index]
            question = next(turn.text for turn in sample.turns if turn.role == "user")
            question = question.replace(IMAGE_PLACEHOLDER, "").strip()
            if len(sample.images) == 1 and question not in found:
                found[question] = Example(decode_image(sample.images[0]), question)
        except SampleError:
            continue
    return list(islice(found.values(), _N_SHOWN))


def drawn() -> list[Example]:
    """Coloured shapes like those that the quickstart's model knows."""
    ground, red, blue, green = (240, 240, 235), (215, 35, 35), (35, 65, 215), (35, 150, 55)
    circle, square, both = (Image.new("RGB", (336, 336), ground) for _ in range(3))
    ImageDraw.Draw(circle).ellipse((28, 28, 140, 140), fill=red)
    ImageDraw.Draw(square).rectangle((200, 196, 300, 296), fill=blue)
    ImageDraw.Draw(both).polygon(((84, 196), (28, 300), (140, 300)), fill=green)
    ImageDraw.Draw(both).ellipse((200, 28, 312, 140), fill=blue)
    return [
        Example(circle, "What shape is the object?"),
        Example(square, "Where is the blue square?"),
        Example(both, "How many objects are there?"),
    ]
