"""What a stage leaves for the next one, and the export to plain transformers.

A stage that trained the projector alone, between parts as they were published, leaves `projector.safetensors`
and `projector.json` (a hash and what the projector joins). Any other leaves a whole LLaVA model that
`from_pretrained` loads, LoRA merged, and the adapter beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_train.config import ModelSection
from llava_train.errors import UserError
from llava_train.files import damage, sha256, share
from llava_train.git_lfs import lfs_problem_of_model
from llava_train.model.export_files import write_model
from llava_train.model.fit import copy_weights, misfits, shapes_of
from llava_train.model.foreign import load_transformers
from llava_train.model.foreign_files import (
    ADAPTER_FOLDER,
    ForeignError,
    Kind,
    NothingUnderstood,
    State,
    kind_of,
    local_path,
)
from llava_train.model.mm_projector import check_settings, feature_settings, load_mm_projector
from llava_train.model.original import read_original, whole_state
from llava_train.model.trainable import is_linear, part_module
from llava_train.run_files import RESULT_FOLDER

PROJECTOR_FILE = "projector.safetensors"
PROJECTOR_CARD = "projector.json"


class HandOffError(UserError):
    """`init_from` cannot be used. The message names the folder and the mend."""


@contextmanager
def _of_init_from() -> Iterator[None]:
    """What is wrong with weights is wrong with the key that names them."""
    try:
        yield
    except ForeignError as error:
        raise HandOffError(f"init_from: {error}") from error


def save_projector(model: LlavaForConditionalGeneration, section: ModelSection, folder: Path) -> str:
    """Writes the projector and its card; returns the hash of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_contiguous(part_module(model, "projector").state_dict()), folder / PROJECTOR_FILE)
    share(folder / PROJECTOR_FILE)
    digest = sha256(folder / PROJECTOR_FILE)
    card = {"sha256": digest, **_joined(section, model)}
    (folder / PROJECTOR_CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return digest


@_of_init_from()
def load_init(init_from: str, model: LlavaForConditionalGeneration, section: ModelSection) -> str:
    """Loads what an earlier stage trained into `model`; returns a line that says what it was.

    Args:
        init_from: as `StageConfig.start` has it: a run folder or a folder of such a result, a LLaVA model of
            transformers or of the original (with or without LoRA), a folder with `mm_projector.bin` or that file, or
            the hub id of any of these.

    Raises:
        HandOffError: nothing there, a wrong hash, or parts that do not fit.
    """
    check_init(init_from)
    path = _result_of(init_from)
    if problem := lfs_problem_of_model(path):
        raise ForeignError(problem)
    if (path / PROJECTOR_CARD).is_file():
        return _load_projector(path, model, section)
    kind = kind_of(path)
    if kind is Kind.MM_PROJECTOR:
        load_mm_projector(path, model, section)
    elif kind is Kind.TRANSFORMERS:
        _continue_transformers(path, model, section)
    else:
        _continue_original(path, model, section)
    return f"{'projector' if kind is Kind.MM_PROJECTOR else 'whole model'} from {path}"


@_of_init_from()
def is_whole_model(init_from: str) -> bool:
    """Whether `init_from` names a whole model, not a projector alone. Raises HandOffError."""
    path = _result_of(init_from)
    return not (path / PROJECTOR_CARD).is_file() and kind_of(path) is not Kind.MM_PROJECTOR


def _result_of(init_from: str) -> Path:
    """The folder or file that is meant, downloaded if need be. Raises ForeignError."""
    path = local_path(init_from)
    return path / RESULT_FOLDER if (path / RESULT_FOLDER).is_dir() else path


@_of_init_from()
def check_init(init_from: str, output: str | None = None) -> None:
    """Refuses an `init_from` that cannot be continued, before any part is loaded.

    Args:
        output: the folder of runs; a name below it is never looked up on the hub.

    Raises:
        HandOffError: the run does not exist or is not finished.
    """
    folder, remedy = Path(init_from), "run that stage to its end first"
    if output is not None and not folder.exists():
        if (Path(output) / folder.name).is_dir():
            found = f"but a run {folder.name} in {output}; write `init_from: {folder.name}`"
            raise HandOffError(f"init_from: there is no {init_from}, {found}")
        if Path(output) in folder.parents:
            raise HandOffError(f"init_from: there is no run {init_from}; {remedy}")
        if "/" not in init_from:
            raise HandOffError(
                f"init_from: there is no run {init_from} in {output}, and no such file or folder in {Path.cwd()}; "
                f"{remedy}, or name another run, a model, or a hub id (owner/name)"
            )
    if (folder / RESULT_FOLDER).is_dir():
        reason = damage(folder / RESULT_FOLDER)
        if reason is not None:
            raise HandOffError(f"init_from: {folder / RESULT_FOLDER} is not a finished result ({reason}); {remedy}")
    elif folder.exists() and not (folder / PROJECTOR_CARD).is_file():
        try:
            kind_of(folder)
        except NothingUnderstood as error:
            raise HandOffError(f"init_from: {folder} holds no finished result ({error}); {remedy}") from error


def export_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    end_of_turn_id: int,
    folder: Path,
    peft_model: PeftModel | None = None,
) -> None:
    """Writes a model that plain transformers loads, with its processor. LoRA adapters are merged into it.

    Generation stops at `end_of_turn_id`. The adapter (peft format) goes into the sibling folder `adapter`.
    """
    if peft_model is not None:
        peft_model.save_pretrained(str(folder.parent / ADAPTER_FOLDER))
        save_file(
            _contiguous(part_module(model, "projector").state_dict()),
            folder.parent / ADAPTER_FOLDER / PROJECTOR_FILE,
        )
        share(folder.parent / ADAPTER_FOLDER)
        model = peft_model.merge_and_unload()
    write_model(model, processor, end_of_turn_id, folder)


def _load_projector(folder: Path, model: LlavaForConditionalGeneration, section: ModelSection) -> str:
    card = json.loads((folder / PROJECTOR_CARD).read_text(encoding="utf-8"))
    digest = sha256(folder / PROJECTOR_FILE)
    if digest != card["sha256"]:
        raise HandOffError(
            f"init_from: {folder / PROJECTOR_FILE} has sha256 {digest[:16]}..., but {PROJECTOR_CARD} says "
            f"{card['sha256'][:16]}...: the file changed after the stage that wrote it; run that stage again"
        )
    for key, ours in _joined(section, model).items():
        if (_identity(card[key]) if key in ("vision_tower", "language_model") else card[key]) != ours:
            raise HandOffError(
                f"init_from: the projector in {folder} was trained with {key} = {card[key]!r}, this stage has "
                f"{ours!r}; use the same parts in both stages"
            )
    projector, trained = part_module(model, "projector"), load_file(folder / PROJECTOR_FILE)
    for problem in misfits(shapes_of(projector.state_dict()), shapes_of(trained)):
        raise HandOffError(
            f"init_from: the projector in {folder} does not fit the parts of the model section: {problem}; their "
            "names are the same, so one of them is another model now"
        )
    projector.load_state_dict(trained)
    return f"projector from {folder}, sha256 {digest[:16]}"


def _continue_transformers(folder: Path, model: LlavaForConditionalGeneration, section: ModelSection) -> None:
    trained = load_transformers(folder, model.dtype)
    config = trained.config
    settings = {
        "projector": "linear" if is_linear(trained) else "mlp2x_gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select": "patch" if config.vision_feature_select_strategy == "default" else "full",
    }
    check_settings(settings, section, folder)
    _copy(model, trained.state_dict(), folder, config.image_token_id)


def _continue_original(folder: Path, model: LlavaForConditionalGeneration, section: ModelSection) -> None:
    original = read_original(folder, model.dtype)
    settings = {"projector": "linear" if original.is_linear else "mlp2x_gelu", **feature_settings(original.settings)}
    if original.vision_tower:
        settings.pop("vision_tower")  # it brings its own
    check_settings(settings, section, folder)
    _copy(model, whole_state(original, model.state_dict()), folder, None)


def _copy(model: LlavaForConditionalGeneration, state: State, folder: Path, image_token_id: int | None) -> None:
    problem = copy_weights(model, state, image_token_id)
    if problem is not None:
        raise HandOffError(
            f"init_from: the model in {folder} does not fit the parts of the model section: {problem}; name there the "
            "parts that it was made of"
        )


def _joined(section: ModelSection, model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """What a projector was made for: it is meaningless between other parts."""
    return {
        "projector": section.projector,
        "vision_tower": _identity(section.vision_tower),
        "language_model": _identity(section.language_model),
        "vision_feature_layer": section.vision_feature_layer,
        "vision_feature_select": section.vision_feature_select,
        "image_seq_length": model.config.image_seq_length,
    }


def _identity(part: Any) -> Any:
    """A part's name without its place: `lmsys/vicuna-7b-v1.5` is also `/models/vicuna-7b-v1.5`."""
    if isinstance(part, str):
        return Path(part).name
    part = part if isinstance(part, dict) else part.model_dump(mode="json")
    return {key: Path(value).name if key == "tokenizer" else value for key, value in part.items()}


def _contiguous(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
