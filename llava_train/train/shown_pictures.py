"""Small copies of the pictures that a run's shown questions are about, so that others can look at them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava_train.data.images import decode_image
from llava_train.run_files import PICTURES_FOLDER
from llava_train.use.questions import Item

MOST_PIXELS = 512
"""Of a side."""


def save_pictures(items: Sequence[Item], run_dir: Path) -> list[list[str]]:
    """Saves the pictures of questions as JPEG in the run's folder; they must be readable.

    Names are numbers (`pictures/question-0002.jpg`, a second picture of it `-0002-2.jpg`): an id may be no file's name.

    Returns:
        For each question the files, relative to `run_dir`; one that cannot be written is left out.
    """
    saved: list[list[str]] = []
    for number, item in enumerate(items, start=1):
        saved.append([])
        for within, picture in enumerate(item.pictures, start=1):
            name = f"{PICTURES_FOLDER}/question-{number:04d}{f'-{within}' if within > 1 else ''}.jpg"
            image = decode_image(picture)
            image.thumbnail((MOST_PIXELS, MOST_PIXELS))
            with suppress(OSError):  # a full disk: the run goes on without
                (run_dir / PICTURES_FOLDER).mkdir(parents=True, exist_ok=True)
                image.save(run_dir / name, "JPEG", quality=85)
                saved[-1].append(name)
    return saved
