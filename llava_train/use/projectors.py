"""A trained projector between parts that a user names: `LLaVA(vision, language, projector=...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llava_train.config import ImageSection, ModelSection
from llava_train.errors import UserError
from llava_train.model.build import Llava
from llava_train.model.foreign_files import MM_PROJECTOR_FILE, local_path, read_json, read_tensors
from llava_train.model.mm_projector import feature_settings, projector_from
from llava_train.model.weights import PROJECTOR_CARD, RESULT_FOLDER, check_init, is_whole_model, load_init
from llava_train.stage_file import RUN_CARD, load_run_card
from llava_train.use.loading import LoadError

_OF_FEATURES = ("projector", "vision_feature_layer", "vision_feature_select")
"""Keys of the model section that a projector was trained with, beside the parts that it joins."""


@contextmanager
def _of_projector() -> Iterator[None]:
    """Names the argument where what reads projectors names the key of a stage file."""
    try:
        yield
    except UserError as error:
        raise LoadError(f"projector: {str(error).removeprefix('init_from: ')}") from error


@_of_projector()
def settings_of_projector(projector: str) -> tuple[dict[str, Any], ImageSection]:
    """Return what a projector was trained with: keys of the model section, and how pictures were prepared.

    Args:
        projector: a run of stage 1 or its `model/`, an `mm_projector.bin` or a folder with one, or a hub id of these.

    Raises:
        LoadError: no projector there, or a whole model.
    """
    check_init(projector)
    if is_whole_model(projector):
        raise LoadError(f"{projector} is a whole model; load it with LLaVA.from_pretrained({projector!r})")
    path = local_path(projector)
    folder = path / RESULT_FOLDER if (path / RESULT_FOLDER).is_dir() else path
    if (folder / PROJECTOR_CARD).is_file():
        card = read_json(folder / PROJECTOR_CARD)
        has_run = (folder.parent / RUN_CARD).is_file()
        image = load_run_card(folder.parent).image if has_run else ImageSection()
        return {key: card[key] for key in _OF_FEATURES}, image
    is_linear = projector_from(read_tensors([path / MM_PROJECTOR_FILE if path.is_dir() else path]), path)[1]
    settings: dict[str, Any] = {"projector": "linear" if is_linear else "mlp2x_gelu"}
    if not (path / "config.json").is_file():
        return settings, ImageSection()
    original = read_json(path / "config.json")
    settings.update({key: value for key, value in feature_settings(original).items() if key in _OF_FEATURES})
    return settings, ImageSection(aspect="pad" if original.get("image_aspect_ratio", "pad") == "pad" else "crop")


@_of_projector()
def load_projector(projector: str, llava: Llava, section: ModelSection) -> None:
    """Loads a trained projector between the parts of `section`. Raises LoadError where it does not fit them."""
    load_init(projector, llava.model, section)
