"""Small copies of the pictures that a run's shown questions are about, so that others can look at them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llava_train.data.images import decode_image
from llava_train.files import written_aside
from llava_train.run_files import PICTURES_FOLDER
from llava_train.use.questions import Item

MOST_PIXELS = 512
"""Of a side."""


def save_pictures(items: Sequence[Item], run_dir: Path) -> list[list[str]]:
    """Saves the pictures of questions as JPEG in the run's folder; they must be readable.

    Names are of their content (`pictures/0c85e8187b93e84f.jpg`): an id may be no file's name, and a run that goes on
    with other questions keeps the pictures of its earlier answers.

    Returns:
        For each question the files, relative to `run_dir`; one that cannot be written is left out.
    """
    saved: list[list[str]] = []
    for item in items:
        saved.append([])
        for picture in item.pictures:
            image, content = decode_image(picture), io.BytesIO()
            image.thumbnail((MOST_PIXELS, MOST_PIXELS))
            image.save(content, "JPEG", quality=85)
            name = f"{PICTURES_FOLDER}/{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.jpg"
            with suppress(OSError):  # a full disk: the run goes on without
                with written_aside(run_dir / name, "wb", durably=False) as file:
                    file.write(content.getvalue())
                saved[-1].append(name)
    return saved
