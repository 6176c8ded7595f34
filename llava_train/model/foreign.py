"""Whole models that others wrote, of the original LLaVA or of transformers, made ready to answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_train.config import ImageSection, ModelSection
from llava_train.failures import reason
from llava_train.model.build import NOT_LOADED, Llava, join, load_vision_tower, widen
from llava_train.model.compatibility import BuildError
from llava_train.model.fit import misfits, shapes_of
from llava_train.model.foreign_files import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ForeignError,
    Kind,
    State,
    kind_of,
    local_path,
)
from llava_train.model.mm_projector import feature_settings
from llava_train.model.original import Original, named_like, read_original
from llava_train.model.processor import Front, build_processor, count_encoder_tokens
from llava_train.model.trainable import part_module
from llava_train.refusals import SectionError, validated

_TOKENIZER_FILES = (".json", ".model", ".txt")


def load_whole(name: str | Path, dtype: torch.dtype | None = None, **settings: Any) -> Llava:
    """A foreign model in evaluation mode, on the CPU, with sdpa. Only one of transformers may have a chat template.

    Args:
        name: a folder or a hub id.
        dtype: of all weights; None for the one they were saved in.
        settings: for transformers' `from_pretrained`, such as `quantization_config`; only for models of transformers.

    Raises:
        ForeignError: nothing that is understood, or nothing that can be computed here. The message says what to do.
    """
    folder = local_path(name)
    kind = kind_of(folder)
    if kind is Kind.MM_PROJECTOR:
        raise ForeignError(f"{folder} is {kind.value} without a model; name it as init_from of a stage file")
    if kind is Kind.TRANSFORMERS:
        return _of_transformers(folder, dtype, settings)
    if settings:
        raise ForeignError(f"{folder} is {kind.value}, which cannot be quantized; run `llava-train export` first")
    return _joined(read_original(folder, dtype))


def load_transformers(folder: Path, dtype: torch.dtype | None = None, **settings: Any) -> LlavaForConditionalGeneration:
    """A model of transformers from a folder; the adapter that an export of ours has beside it is merged.

    Raises:
        ForeignError: nothing that transformers loads, or an adapter beside weights that shall be quantized.
    """
    has_adapter = (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()
    if has_adapter and "quantization_config" in settings:
        raise ForeignError(f"{folder} has an adapter beside it; quantize `llava-train export --merge-lora` of its run")
    try:
        model, loaded = LlavaForConditionalGeneration.from_pretrained(
            str(folder), dtype=dtype or "auto", output_loading_info=True, **settings
        )
        if missing := loaded["missing_keys"]:
            raise ForeignError(f"{folder} lacks {len(missing)} of its tensors, such as {min(missing)}; copy it again")
        if has_adapter:
            PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER)).merge_and_unload()
        return model.eval()
    except ForeignError:
        raise
    except (*NOT_LOADED, UnpicklingError) as error:
        raise ForeignError(f"{folder} is not a LLaVA model that transformers loads: {reason(error)}") from error


def _joined(original: Original) -> Llava:
    language_model = original.language_model
    try:
        section, front = _front(original)
        tower = load_vision_tower(section.vision_tower, front.vision_config, language_model.dtype)
    except BuildError as error:
        raise ForeignError(
            f"{original.folder} needs its tokenizer, and the vision tower that its config.json names "
            f"(mm_vision_tower: {original.settings.get('mm_vision_tower')}; a folder may stand there): {error}"
        ) from error
    widen(language_model, len(front.tokenizer))
    if original.vision_tower:
        _fill(tower, named_like(original.vision_tower, tower.state_dict()), original.folder, "vision tower")
    model = join(section, front, language_model, tower)
    _fill(part_module(model, "projector"), original.projector, original.folder, "projector")
    model.set_attn_implementation("sdpa")
    return Llava(model, front.processor, front.n_image_tokens)


def _front(original: Original) -> tuple[ModelSection, Front]:
    """Its settings as a model section, and its processor. Raises BuildError."""
    settings = original.settings
    image = ImageSection(aspect="pad" if settings.get("image_aspect_ratio") == "pad" else "crop")
    with _language_model_alone(original) as folder:
        try:
            section = validated(
                ModelSection,
                language_model=folder,
                projector="linear" if original.is_linear else "mlp2x_gelu",
                chat_template="vicuna_v1",
                **feature_settings(settings),
            )
        except SectionError as error:
            raise ForeignError(f"{original.folder / 'config.json'}: {error}") from None
        return section, build_processor(section, image)


@contextmanager
def _language_model_alone(original: Original) -> Iterator[str]:
    """A folder that transformers takes for the language model: its tokenizer, and its configuration without LLaVA's."""
    with TemporaryDirectory() as name:
        for file in original.tokenizer_folder.iterdir():
            if file.suffix in _TOKENIZER_FILES and file.name != "config.json":
                (Path(name) / file.name).symlink_to(file.resolve())
        original.language_model.config.save_pretrained(name)
        yield name


def _fill(module: nn.Module, state: State, folder: Path, part: str) -> None:
    for problem in misfits(shapes_of(module.state_dict()), shapes_of(state)):
        raise ForeignError(f"the {part} in {folder} does not fit what its config.json says: {problem}")
    module.load_state_dict(state)


def _of_transformers(folder: Path, dtype: torch.dtype | None, settings: dict[str, Any]) -> Llava:
    model = load_transformers(folder, dtype, **settings)
    trusted = {"trust_remote_code": settings.get("trust_remote_code", False)}
    try:
        processor = AutoProcessor.from_pretrained(str(folder), **trusted)
    except (OSError, ValueError) as error:
        raise ForeignError(f"{folder} has no processor that transformers loads: {reason(error)}") from error
    if not isinstance(processor, LlavaProcessor):
        raise ForeignError(f"{folder} has a {type(processor).__name__}, not a LlavaProcessor")
    config = model.config
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    image_processor = processor.image_processor
    size = (getattr(image_processor, "crop_size", None) or image_processor.size)["height"]
    n_tokens = count_encoder_tokens(deepcopy(vision), size, config.vision_feature_layer)
    processor.patch_size, processor.vision_feature_select_strategy = vision.patch_size, strategy
    processor.num_additional_image_tokens = n_tokens - (size // vision.patch_size) ** 2
    model.set_attn_implementation("sdpa")
    return Llava(model, processor, n_tokens - (strategy == "default"))
