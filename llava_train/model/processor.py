"""What stands between samples and a model: its tokenizer and image processor, made without loading its weights.

build_processor(section, image) = the tokenizer, with an `<image>` token
                                -> the encoder's configuration, and how pictures are prepared for it
                                -> count the image tokens by a forward pass of shapes alone (meta device)
                                -> LlavaProcessor that makes the same number of them
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.failures import cannot_load
from llava_train.files import is_hub_id
from llava_train.git_lfs import lfs_problem_of_model
from llava_train.model.compatibility import BuildError, check_class_token, check_processor

IMAGE_TOKEN = "<image>"
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
"""SigLIP 2 of a fixed resolution is a `siglip_vision_model` too; NaFlex (`siglip2_vision_model`) takes patches, not
pictures, which transformers' LLaVA cannot give it."""
INTERPOLATING = ("dinov2", "dinov2_with_registers")
"""Vision towers that take pictures of another size than their own."""

_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Front:
    """What a model reads samples with. The processor does not have a chat template yet."""

    processor: LlavaProcessor
    n_image_tokens: int
    """Tokens that an image takes in the language model."""
    vision_config: PreTrainedConfig
    hidden_size: int
    """Of the language model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer


def build_processor(section: ModelSection, image: ImageSection) -> Front:
    """The tokenizer and image processor of a model, whose weights are neither loaded nor downloaded.

    Raises:
        BuildError: a part that is missing or does not fit.
    """
    tokenizer = load_tokenizer(section.language_model)
    vision_config, image_settings = load_vision_config(section.vision_tower)
    size = _image_size(vision_config, image.size)
    n_encoder_tokens = count_encoder_tokens(vision_config, size, section.vision_feature_layer)
    check_class_token(section, vision_config, size, n_encoder_tokens)
    n_image_tokens = n_encoder_tokens - (section.vision_feature_select == "patch")
    processor = _processor(section, image, image_settings, tokenizer, vision_config, size, n_encoder_tokens)
    check_processor(processor, size, n_image_tokens)
    return Front(processor, n_image_tokens, vision_config, _hidden_size(section.language_model))


def load_tokenizer(part: str | RandomLanguageModel) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a language model, with `<image>` and a padding token. Raises BuildError."""
    name = part if isinstance(part, str) else part.tokenizer
    _refuse_missing_folder("model.language_model", name)
    refuse_lfs_pointers("language_model", name, "config", "tokenizer")
    try:
        own_bytes = isinstance(part, RandomLanguageModel) and name == "bytes"
        tokenizer = byte_tokenizer() if own_bytes else AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BuildError(cannot_load("model.language_model", name, error)) from error
    if not tokenizer.is_fast:
        raise BuildError(f"model.language_model: {name} has no fast tokenizer, which label spans need")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _refuse_missing_folder(key: str, name: str) -> None:
    """Raises BuildError for a folder that is not there: transformers would take it for a hub id."""
    if "/" in name and not is_hub_id(name) and not Path(name).exists():
        counts = "" if Path(name).is_absolute() else f"; its path counts from {Path.cwd()}"
        made = "; `python data/build_small_parts.py` makes those of configs/small" if name.startswith("parts/") else ""
        raise BuildError(f"{key}: cannot load {name}: there is no such folder{counts}{made}")


def _hidden_size(part: str | RandomLanguageModel) -> int:
    try:
        config = (
            AutoConfig.from_pretrained(part) if isinstance(part, str) else config_from(part.config, "language_model")
        )
    except (OSError, ValueError) as error:
        raise BuildError(cannot_load("model.language_model", part, error)) from error
    return int(config.hidden_size)


def load_vision_config(part: str | RandomVisionTower) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Configuration of a vision encoder, and the settings of its image processor (mean, deviation, resampling).

    Of a two-tower model (CLIP, SigLIP) only the vision half is meant. Raises BuildError.
    """
    if isinstance(part, RandomVisionTower):
        config = config_from(part.config, "vision_tower")
        tower_class(config, part.config["model_type"])
        return config, {}
    _refuse_missing_folder("model.vision_tower", part)
    refuse_lfs_pointers("vision_tower", part, "config")
    try:
        config = AutoConfig.from_pretrained(part)
        config = getattr(config, "vision_config", config)
        tower_class(config, part)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(part)
    except BuildError:
        raise
    except (OSError, ValueError) as error:
        raise BuildError(cannot_load("model.vision_tower", part, error)) from error
    return config, settings


def refuse_lfs_pointers(part: str, name: str, *read: str) -> None:
    """Refuses a part whose files Git LFS has not fetched; `read` as in `lfs_problem_of_model`. Raises BuildError."""
    if problem := lfs_problem_of_model(name, read):
        raise BuildError(f"model.{part}: {problem}")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes: for language models with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": _CHATML_TOKENS})
    return fast


def tower_class(config: PreTrainedConfig, origin: str) -> type[PreTrainedModel]:
    """The class of a vision encoder; `origin` names it in errors. Raises BuildError."""
    if config.model_type not in VISION_TOWERS:
        raise BuildError(
            f"model.vision_tower: {origin} is a {config.model_type}; supported: {', '.join(VISION_TOWERS)}"
        )
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling head, which LLaVA does not use
    return MODEL_MAPPING[type(config)]


def config_from(settings: dict[str, Any], part: str) -> PreTrainedConfig:
    """A transformers config of the settings in a stage file. Raises BuildError."""
    settings = dict(settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except KeyError as error:
        raise BuildError(f"model.{part}.config: model_type is missing") from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise BuildError(f"model.{part}.config: {error}") from error


def _processor(
    section: ModelSection,
    image: ImageSection,
    image_settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    vision_config: PreTrainedConfig,
    size: int,
    n_encoder_tokens: int,
) -> LlavaProcessor:
    square = {"height": size, "width": size}
    wanted = ("image_mean", "image_std", "resample", "rescale_factor")
    image_processor = LlavaImageProcessorPil(
        **{key: image_settings[key] for key in wanted if key in image_settings},
        size=square if image.aspect == "resize" else {"shortest_edge": size},
        crop_size=square,
        do_pad=image.aspect == "pad",
        do_center_crop=image.aspect != "resize",
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="default" if section.vision_feature_select == "patch" else "full",
        num_additional_image_tokens=n_encoder_tokens - (size // vision_config.patch_size) ** 2,
    )


@torch.no_grad()
def count_encoder_tokens(config: PreTrainedConfig, size: int, layers: int | list[int]) -> int:
    """Tokens the vision tower gives for a picture, class token included. `layers` must exist, else BuildError."""
    with torch.device("meta"):
        tower = tower_class(config, "vision_tower")(config)
        pixels = torch.zeros(1, 3, size, size, dtype=tower.dtype)
        hidden_states = tower(pixels, output_hidden_states=True).hidden_states
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -len(hidden_states) <= layer < len(hidden_states):
            raise BuildError(
                f"model.vision_feature_layer: {layer} is out of range; the tower has hidden states "
                f"{-len(hidden_states)} to {len(hidden_states) - 1}"
            )
    return int(hidden_states[0].shape[1])


def _image_size(vision_config: PreTrainedConfig, wanted: int | None) -> int:
    """Side of the square that the encoder sees, in pixels. Raises BuildError."""
    own, patch = vision_config.image_size, vision_config.patch_size
    size = wanted or own
    if size != own and vision_config.model_type not in INTERPOLATING:
        raise BuildError(
            f"image.size: {size}, but {vision_config.model_type} takes {own} pixels only; leave image.size out"
        )
    if size != own and size % patch:  # SigLIP's 384 are no multiple of 14: it leaves the rest of a picture out
        raise BuildError(f"image.size: {size} is not a multiple of the encoder's patch size {patch}")
    return size
