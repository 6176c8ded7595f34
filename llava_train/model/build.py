"""From parts to a model: a vision tower and a language model joined as transformers' LLaVA, and its processor.

build_llava(section) = load both parts
                     -> give the tokenizer an `<image>` token, the embeddings a row for it
                     -> LlavaForConditionalGeneration around the parts, with a fresh projector
                     -> count the image tokens by a real forward pass
                     -> LlavaProcessor that makes the same number of them
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.model.attention import PACKED
from llava_train.model.compatibility import (
    BuildError,
    check_class_token,
    check_packing,
    check_processor,
    refuse_unlike_llava,
)

IMAGE_TOKEN = "<image>"
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
"""SigLIP 2 of a fixed resolution is a `siglip_vision_model` too; NaFlex (`siglip2_vision_model`) takes patches, not
pictures, which transformers' LLaVA cannot give it."""
INTERPOLATING = ("dinov2", "dinov2_with_registers")
"""Vision towers that take pictures of another size than their own."""

_VOCABULARY_MULTIPLE = 64
_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


@dataclass(frozen=True)
class Llava:
    """A model and its processor, which does not have a chat template yet."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    n_image_tokens: int
    """Tokens that an image takes in the language model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer


def build_llava(section: ModelSection, image: ImageSection, dtype: torch.dtype, seed: int = 0) -> Llava:
    """Loads the parts and joins them.

    Args:
        section: the parts.
        image: how pictures are made square.
        dtype: of all parts.
        seed: of the fresh projector's weights.

    Raises:
        BuildError: a part that is missing or does not fit.
    """
    language_model, tokenizer = load_language_model(section.language_model, dtype)
    vision_tower, image_settings = load_vision_tower(section.vision_tower, dtype)
    image_token_id = add_image_token(tokenizer, language_model)
    size = _image_size(vision_tower.config, image.size)
    model = _join(section, language_model, vision_tower, image_token_id, seed)
    check_packing(model)
    n_encoder_tokens = _count_encoder_tokens(model, size)
    check_class_token(section, vision_tower.config, size, n_encoder_tokens)
    n_image_tokens = n_encoder_tokens - (section.vision_feature_select == "patch")
    model.config.image_seq_length = n_image_tokens
    processor = _processor(section, image, image_settings, tokenizer, vision_tower.config, size, n_encoder_tokens)
    check_processor(processor, size, n_image_tokens)
    return Llava(model, processor, n_image_tokens)


def load_language_model(
    part: str | RandomLanguageModel, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its fast tokenizer. Raises BuildError."""
    origin = part if isinstance(part, str) else f"a {part.config.get('model_type')} with tokenizer {part.tokenizer}"
    try:
        if isinstance(part, RandomLanguageModel):
            tokenizer = byte_tokenizer() if part.tokenizer == "bytes" else AutoTokenizer.from_pretrained(part.tokenizer)
            config = _config_from(part.config, "language_model")
            config.vocab_size = max(len(tokenizer), part.config.get("vocab_size", 0))
            model = _seeded(part.seed, lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        else:
            tokenizer = AutoTokenizer.from_pretrained(part)
            model = AutoModelForCausalLM.from_pretrained(part, dtype=dtype)
    except BuildError:
        raise
    except (OSError, ValueError) as error:
        raise BuildError(f"model.language_model: cannot load {origin}: {error}") from error
    if not tokenizer.is_fast:
        raise BuildError(f"model.language_model: {origin} has no fast tokenizer, which label spans need")
    refuse_unlike_llava(model)
    return model, tokenizer


def load_vision_tower(part: str | RandomVisionTower, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A vision encoder and the settings of its image processor (mean, deviation, resampling).

    Of a two-tower model (CLIP, SigLIP) only the vision half is loaded. Raises BuildError.
    """
    if isinstance(part, RandomVisionTower):
        config = _config_from(part.config, "vision_tower")
        tower_class = _tower_class(config, part.config["model_type"])
        return _seeded(part.seed, lambda: tower_class(config)).to(dtype), {}
    try:
        config = AutoConfig.from_pretrained(part)
        config = getattr(config, "vision_config", config)
        tower_class = _tower_class(config, part)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(part)
        tower = tower_class.from_pretrained(part, config=config, dtype=dtype)
    except BuildError:
        raise
    except (OSError, ValueError) as error:
        raise BuildError(f"model.vision_tower: cannot load {part}: {error}") from error
    return tower, settings


def add_image_token(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel) -> int:
    """Adds `<image>` (and a padding token) to the tokenizer and rows to the embeddings; returns its id.

    New rows are the mean of the old ones: on every rank and in every stage the same.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    n_old = language_model.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_old:
        language_model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=_VOCABULARY_MULTIPLE, mean_resizing=False
        )
        with torch.no_grad():
            for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
                layer.weight[n_old:] = layer.weight[:n_old].float().mean(dim=0).to(layer.weight.dtype)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


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


def new_projector(section: ModelSection, config: LlavaConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """A fresh projector. `linear` has an identity, to stay frozen, as its second layer and no activation."""
    projector = _seeded(seed, lambda: LlavaMultiModalProjector(config))
    if section.projector == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    return projector.to(dtype)


def _join(
    section: ModelSection,
    language_model: PreTrainedModel,
    vision_tower: PreTrainedModel,
    image_token_id: int,
    seed: int,
) -> LlavaForConditionalGeneration:
    """The parts as one LLaVA model. The parts' own tensors are used, none is copied."""
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        projector_hidden_act="linear" if section.projector == "linear" else "gelu",
        vision_feature_select_strategy="default" if section.vision_feature_select == "patch" else "full",
        vision_feature_layer=section.vision_feature_layer,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    dtype = language_model.dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector = new_projector(section, config, dtype, seed)
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    model.tie_weights()
    model.generation_config = _generation_config(language_model)
    model.config.dtype = dtype
    model.model.language_model.set_attn_implementation(PACKED)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


def _generation_config(language_model: PreTrainedModel) -> GenerationConfig:
    """The language model's, less sampling settings that it does not use: Vicuna has some, and cannot be saved with."""
    config = copy.deepcopy(language_model.generation_config)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config


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
def _count_encoder_tokens(model: LlavaForConditionalGeneration, size: int) -> int:
    """Tokens the vision tower gives for a picture, class token included, found by a forward pass."""
    tower = model.model.vision_tower
    pixels = torch.zeros(1, 3, size, size, dtype=tower.dtype)
    hidden_states = tower(pixels, output_hidden_states=True).hidden_states
    layers = model.config.vision_feature_layer
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -len(hidden_states) <= layer < len(hidden_states):
            raise BuildError(
                f"model.vision_feature_layer: {layer} is out of range; the tower has hidden states "
                f"{-len(hidden_states)} to {len(hidden_states) - 1}"
            )
    return hidden_states[0].shape[1]


def _image_size(vision_config: PreTrainedConfig, wanted: int | None) -> int:
    """Side of the square that the encoder sees, in pixels. Raises BuildError."""
    own, patch = vision_config.image_size, vision_config.patch_size
    size = wanted or own
    if size != own and vision_config.model_type not in INTERPOLATING:
        raise BuildError(
            f"image.size: {size}, but {vision_config.model_type} takes {own} pixels only; leave image.size out"
        )
    if size % patch:
        raise BuildError(f"image.size: {size} is not a multiple of the encoder's patch size {patch}")
    return size


def _tower_class(config: PreTrainedConfig, origin: str) -> type[PreTrainedModel]:
    if config.model_type not in VISION_TOWERS:
        raise BuildError(
            f"model.vision_tower: {origin} is a {config.model_type}; supported: {', '.join(VISION_TOWERS)}"
        )
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling head, which LLaVA does not use
    return MODEL_MAPPING[type(config)]


def _config_from(settings: dict[str, Any], part: str) -> PreTrainedConfig:
    settings = dict(settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except KeyError as error:
        raise BuildError(f"model.{part}.config: model_type is missing") from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise BuildError(f"model.{part}.config: {error}") from error


def _seeded(seed: int, make: Any) -> Any:
    """What `make()` returns, its random weights decided by `seed` and no one else's random state touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
