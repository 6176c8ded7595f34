"""Checkpoints of the original LLaVA, in full and with LoRA, taken apart.

A full one is a language model whose tensors stand among those of a projector (`model.mm_projector.*`) and, where it
was trained too, a vision tower (`model.vision_tower.*`); its config.json holds the settings of all three. One with
LoRA is adapters for a base (Vicuna, or a full checkpoint), and beside them whatever else was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llava_train.model.build import load_language_model
from llava_train.model.compatibility import BuildError, refuse_unlike_llava
from llava_train.model.foreign_files import (
    ADAPTER_CONFIG,
    NON_LORA_FILE,
    ForeignError,
    State,
    has_projector,
    local_path,
    read_json,
    read_tensors,
    weight_files,
)
from llava_train.model.mm_projector import projector_from

_TOWER_KEY = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(.+)")
_OLD_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""What old versions of transformers saved beside weights."""
_OLD_ROPE_KEYS = {"rope_theta", "rope_scaling"}
_OF_THE_FILE = {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class Original:
    """The parts of an original checkpoint."""

    folder: Path
    settings: dict[str, Any]
    """Its config.json."""
    language_model: PreTrainedModel
    """Its vocabulary as it was saved, without `<image>`; adapters merged."""
    tokenizer_folder: Path
    projector: State
    """Under transformers' names (`linear_1.weight`)."""
    is_linear: bool
    """Whether the projector is LLaVA v1's single layer."""
    vision_tower: State
    """Under the names of the encoder; empty where it was not trained."""


def read_original(folder: Path, dtype: torch.dtype | None = None) -> Original:
    """Reads a checkpoint of the original, with or without LoRA.

    Args:
        dtype: of the language model; None for the one that the projector was saved in.

    Raises:
        ForeignError: tensors that are missing, or a kind of LLaVA that cannot be computed here.
    """
    settings = read_json(folder / "config.json")
    _refuse_unsupported(settings, folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_lora(folder, settings, dtype)
    state, tower, projector = _split(read_tensors(weight_files(folder)))
    layers, is_linear = projector_from(projector, folder)
    language_model = _language_model(settings, state, dtype or layers["linear_1.weight"].dtype, folder)
    return Original(folder, settings, language_model, folder, layers, is_linear, tower)


def whole_state(original: Original, like: Mapping[str, torch.Tensor]) -> State:
    """Its tensors under the names of `LlavaForConditionalGeneration.state_dict()`, vocabulary as it was saved.

    Args:
        like: the state dict of the model that they shall go into: versions of transformers name a tower differently.
    """
    prefix = "model.vision_tower."
    tower_names = [name.removeprefix(prefix) for name in like if name.startswith(prefix)]
    language_model = original.language_model
    return {
        **{f"model.language_model.{name}": t for name, t in language_model.base_model.state_dict().items()},
        "lm_head.weight": language_model.get_output_embeddings().weight,
        **{f"model.multi_modal_projector.{name}": t for name, t in original.projector.items()},
        **{prefix + name: t for name, t in named_like(original.vision_tower, tower_names).items()},
    }


def named_like(tower: Mapping[str, torch.Tensor], names: Iterable[str]) -> State:
    """A tower's tensors under the names of another of its kind: with or without `vision_model.` before them.

    What the other does not have and does not need is left out: SigLIP's pooling head, old buffers.
    """
    known, prefix = set(names), "vision_model."
    renamed = {}
    for name, tensor in tower.items():
        bare = name.removeprefix(prefix)
        ours = next((known_as for known_as in (bare, prefix + bare) if known_as in known), name)
        if ours in known or not (bare.startswith("head.") or bare.endswith(_OLD_BUFFERS)):
            renamed[ours] = tensor
    return renamed


def _read_lora(folder: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> Original:
    trained = read_tensors([folder / NON_LORA_FILE])
    state, tower, projector = _split({name.removeprefix("base_model.model."): t for name, t in trained.items()})
    layers, is_linear = projector_from(projector, folder / NON_LORA_FILE)
    dtype = dtype or layers["linear_1.weight"].dtype
    named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    try:
        base = local_path(str(named))
        if has_projector(base):
            of_base = read_original(base, dtype)
            language_model, tower = of_base.language_model, {**of_base.vision_tower, **tower}
        else:
            language_model = load_language_model(str(base), dtype, n_tokens=0)
    except (ForeignError, BuildError) as error:
        raise ForeignError(
            f"{folder} are adapters for {named}, which cannot be loaded; write the folder of that model into "
            f"{ADAPTER_CONFIG} as base_model_name_or_path ({error})"
        ) from error
    if strangers := language_model.load_state_dict(state, strict=False).unexpected_keys:
        raise ForeignError(f"{folder / NON_LORA_FILE} holds {strangers[0]}, which {named} does not have")
    return Original(folder, settings, _merged(language_model, folder), base, layers, is_linear, tower)


def _merged(language_model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The language model with the adapters in `folder` added to its weights, by peft."""
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise ForeignError(f"{folder} lacks adapter_model.safetensors (or .bin); copy the folder again")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # else peft warns that the base has another name
        peft_model = get_peft_model(language_model, config)
        loaded = set_peft_model_state_dict(peft_model, read_tensors(files[:1]))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ForeignError(f"the adapters in {folder} do not fit their base model: {error}") from error
    if wrong := [*loaded.unexpected_keys, *(name for name in loaded.missing_keys if ".lora_" in name)]:
        raise ForeignError(f"the adapters in {folder} do not fit their base model: {wrong[0]} (of {len(wrong)})")
    merged = peft_model.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def _split(state: Mapping[str, torch.Tensor]) -> tuple[State, State, State]:
    """Tensors of the language model, of the vision tower (under the encoder's names), and of the projector."""
    language, tower, projector = State(), State(), State()
    for name, tensor in state.items():
        if "mm_projector." in name:
            projector[name] = tensor
        elif match := _TOWER_KEY.fullmatch(name):
            tower[match[1]] = tensor
        elif not name.endswith(_OLD_BUFFERS):
            language[name] = tensor
    return language, tower, projector


def _language_model(settings: dict[str, Any], state: State, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    config = _language_config(settings, folder)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        model, loaded = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        raise ForeignError(f"the language model in {folder} does not fit its config.json: {error}") from error
    for what in ("missing", "unexpected"):
        if names := sorted(loaded[f"{what}_keys"]):
            raise ForeignError(f"{folder}: {len(names)} {what} tensors, such as {names[0]}; copy the folder again")
    refuse_unlike_llava(model)
    return model


def _language_config(settings: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """The configuration of the language model alone: `llava` and `llava_llama` are a llama, `llava_qwen2` a qwen2."""
    model_type = str(settings.get("model_type"))
    family = "llama" if model_type == "llava" else model_type.removeprefix("llava_")
    try:
        known = AutoConfig.for_model(family)
        keys = set(known.to_dict()) - _OF_THE_FILE | _OLD_ROPE_KEYS
        config = type(known)(**{key: value for key, value in settings.items() if key in keys})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ForeignError(f"{folder / 'config.json'} of a {model_type} is not understood: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ForeignError(f"{folder / 'config.json'} is that of a {model_type}, not of a language model with LLaVA")
    return config


def _refuse_unsupported(settings: Mapping[str, Any], folder: Path) -> None:
    problem = None
    if not settings.get("mm_vision_tower", settings.get("vision_tower")):
        problem = "its config.json names no vision tower (mm_vision_tower)"
    elif settings.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        problem = f"it selects features by {settings['mm_vision_select_feature']!r} (mm_vision_select_feature)"
    elif settings.get("mm_use_im_start_end"):
        problem = "it was trained with tokens around each image (mm_use_im_start_end)"
    elif "anyres" in str(settings.get("image_aspect_ratio")) or settings.get("mm_patch_merge_type", "flat") != "flat":
        problem = "it cuts pictures into tiles (LLaVA-NeXT)"
    if problem:
        raise ForeignError(f"{folder} is an original LLaVA that is not supported: {problem}")
