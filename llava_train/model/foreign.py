"""Whole models that others wrote, of the original LLaVA or of transformers, made ready to answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any
from warnings import warn

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_train.config import ImageSection, ModelSection
from llava_train.errors import Note
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
from llava_train.model.processor import IMAGE_TOKEN, INTERPOLATING, Front, build_processor, count_encoder_tokens
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
            str(folder), dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
        for name, theirs, ours in sorted(loaded["mismatched_keys"]):
            raise ForeignError(
                f"{folder}: config.json does not fit the weights: {name} is {list(theirs)} in the file, and would be "
                f"{list(ours)}; copy config.json and the weights again from the same model"
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
    except NOT_LOADED as error:
        raise ForeignError(f"{folder} has no processor that transformers loads: {reason(error)}") from error
    if not isinstance(processor, LlavaProcessor):
        raise ForeignError(f"{folder} has a {type(processor).__name__}, not a LlavaProcessor")
    n_image_tokens = _match_image_tokens(folder, model, processor)
    _match_image_token_id(folder, model, processor)
    model.set_attn_implementation("sdpa")
    return Llava(model, processor, n_image_tokens)


def _match_image_tokens(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> int:
    """Makes the processor and the config count the tokens that the vision tower gives for an image.

    Returns:
        The number of tokens of an image.

    Raises:
        ForeignError: pictures of a size that the tower does not take, or a layer that it does not have.
    """
    config, vision = model.config, model.config.vision_config
    square = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    size, patch, own = square["height"], vision.patch_size, vision.image_size
    fits = size % patch == 0 if size and vision.model_type in INTERPOLATING else size == own
    if not fits or square["width"] != size:
        sides = "no square" if size is None or square["width"] != size else f"pictures of {size} x {size} pixels"
        raise ForeignError(
            f"{folder}: its image processor makes {sides}, but its vision tower takes {own} x {own} pixels in patches "
            f"of {patch}; correct crop_size in preprocessor_config.json (and in processor_config.json, where there is "
            "one), or image_size in config.json"
        )
    try:
        n_tokens = count_encoder_tokens(deepcopy(vision), size, config.vision_feature_layer)
    except BuildError as error:
        raise ForeignError(f"{folder}: config.json: {str(error).removeprefix('model.')}") from error
    processor.patch_size, processor.vision_feature_select_strategy = patch, config.vision_feature_select_strategy
    processor.num_additional_image_tokens = n_tokens - (size // patch) ** 2
    config.image_seq_length = n_tokens - (config.vision_feature_select_strategy == "default")
    return int(config.image_seq_length)


def _match_image_token_id(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Makes the model look for the token that the tokenizer writes for `<image>`; its embedding is never used.

    Raises:
        ForeignError: no such token, or tokens that the model has no embedding for.
    """
    tokenizer, config = processor.tokenizer, model.config
    token_id, n_rows = tokenizer.get_vocab().get(IMAGE_TOKEN), model.get_input_embeddings().num_embeddings
    again = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) again from the model's origin"
    if token_id is None or tokenizer(IMAGE_TOKEN, add_special_tokens=False).input_ids != [token_id]:
        raise ForeignError(f"{folder}: its tokenizer has no token {IMAGE_TOKEN}, where pictures go; {again}")
    if (n_tokens := max(tokenizer.get_vocab().values()) + 1) > n_rows:
        raise ForeignError(
            f"{folder}: its tokenizer has {n_tokens} tokens, but the model has embeddings for {n_rows}; {again}"
        )
    if config.image_token_id != token_id:
        warn(
            f"{folder}: config.json says that {IMAGE_TOKEN} is token {config.image_token_id} (image_token_index), its "
            f"tokenizer says {token_id}; the tokenizer's is used",
            Note,
            stacklevel=2,
        )
    config.image_token_id, processor.image_token_id, processor.image_token = token_id, token_id, IMAGE_TOKEN
