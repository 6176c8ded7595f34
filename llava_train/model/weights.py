"""What a stage leaves for the next one, and the export to plain transformers.

A stage that trained the projector alone, between parts as they were published, leaves `projector.safetensors`
and `projector.json` (a hash and what the projector joins). Any other leaves a whole LLaVA model that
`from_pretrained` loads, LoRA merged, and the adapter beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_train.config import ModelSection
from llava_train.errors import UserError
from llava_train.files import damage, sha256
from llava_train.model.export_files import write_model
from llava_train.model.trainable import part_module

PROJECTOR_FILE = "projector.safetensors"
PROJECTOR_CARD = "projector.json"
RESULT_FOLDER = "model"
ADAPTER_FOLDER = "adapter"

State = dict[str, torch.Tensor]


class HandOffError(UserError):
    """`init_from` cannot be used. The message names the folder and the mend."""


def save_projector(model: LlavaForConditionalGeneration, section: ModelSection, folder: Path) -> str:
    """Writes the projector and its card; returns the hash of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_contiguous(part_module(model, "projector").state_dict()), folder / PROJECTOR_FILE)
    digest = sha256(folder / PROJECTOR_FILE)
    card = {"sha256": digest, **_joined(section, model)}
    (folder / PROJECTOR_CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return digest


def load_init(init_from: str, model: LlavaForConditionalGeneration, section: ModelSection) -> str:
    """Loads what an earlier stage trained into `model`; returns a line that says what it was.

    Args:
        init_from: a run folder, a folder of such a result, or a LLaVA model (folder or hub id).

    Raises:
        HandOffError: nothing there, a wrong hash, or parts that do not fit.
    """
    check_init(init_from)
    folder = _result_of(init_from)
    if is_whole_model(init_from):
        return _load_whole_model(str(folder), model)
    return _load_projector(folder, model, section)


def is_whole_model(init_from: str) -> bool:
    """Whether `init_from` names a whole model, not a projector alone."""
    return not (_result_of(init_from) / PROJECTOR_CARD).is_file()


def _result_of(init_from: str) -> Path:
    folder = Path(init_from)
    return folder / RESULT_FOLDER if (folder / RESULT_FOLDER).is_dir() else folder


def check_init(init_from: str, output: str | None = None) -> None:
    """Refuses an `init_from` that cannot be continued, before any part is loaded.

    Args:
        output: the folder of runs; a name below it is never looked up on the hub.

    Raises:
        HandOffError: the run does not exist or is not finished.
    """
    folder, remedy = Path(init_from), "run that stage to its end first"
    if output is not None and Path(output) in folder.parents and not folder.is_dir():
        raise HandOffError(f"init_from: there is no run {init_from}; {remedy}")
    if (folder / RESULT_FOLDER).is_dir():
        reason = damage(folder / RESULT_FOLDER)
        if reason is not None:
            raise HandOffError(f"init_from: {folder / RESULT_FOLDER} is not a finished result ({reason}); {remedy}")
    elif folder.is_dir() and not any((folder / name).is_file() for name in (PROJECTOR_CARD, "config.json")):
        raise HandOffError(
            f"init_from: {init_from} holds no finished result ({RESULT_FOLDER}/{PROJECTOR_CARD} or a model's "
            f"config.json); {remedy}"
        )


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
        if card[key] != ours:
            raise HandOffError(
                f"init_from: the projector in {folder} was trained with {key} = {card[key]!r}, this stage has "
                f"{ours!r}; use the same parts in both stages"
            )
    part_module(model, "projector").load_state_dict(load_file(folder / PROJECTOR_FILE))
    return f"projector from {folder}, sha256 {digest[:16]}"


def _load_whole_model(name: str, model: LlavaForConditionalGeneration) -> str:
    try:
        trained = LlavaForConditionalGeneration.from_pretrained(name, dtype=model.dtype)
    except (OSError, ValueError) as error:
        raise HandOffError(f"init_from: {name} is neither a run folder nor a LLaVA model: {error}") from error
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise HandOffError(
            f"init_from: the model in {name} does not fit the parts of the model section: {error}"
        ) from error
    return f"whole model from {name}"


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
    return Path(part).name if isinstance(part, str) else part.model_dump(mode="json")


def _contiguous(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
