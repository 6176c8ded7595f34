"""From parts to a model: a vision tower and a language model joined as transformers' LLaVA, and its processor.

build_llava(section) = its processor (processor.py)
                     -> load both parts, a row of the embeddings for `<image>`
                     -> LlavaForConditionalGeneration around the parts, with a fresh projector
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.failures import cannot_load
from llava_train.model.attention import PACKED
from llava_train.model.compatibility import BuildError, check_packing, refuse_unlike_llava
from llava_train.model.processor import (
    IMAGE_TOKEN,
    Front,
    build_processor,
    config_from,
    refuse_lfs_pointers,
    tower_class,
)

VOCABULARY_MULTIPLE = 64
NOT_LOADED = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError, TypeError, LookupError)
"""What transformers raises about a model that it cannot load, or whose weights do not fit its configuration."""


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
    front = build_processor(section, image)
    language_model = load_language_model(section.language_model, dtype, len(front.tokenizer))
    vision_tower = load_vision_tower(section.vision_tower, front.vision_config, dtype)
    model = join(section, front, language_model, vision_tower, seed)
    if isinstance(section.language_model, RandomLanguageModel):  # its config knows no tokenizer
        model.generation_config.eos_token_id = front.tokenizer.eos_token_id
        model.generation_config.bos_token_id = front.tokenizer.bos_token_id
    check_packing(model)
    return Llava(model, front.processor, front.n_image_tokens)


def load_language_model(part: str | RandomLanguageModel, dtype: torch.dtype, n_tokens: int) -> PreTrainedModel:
    """A causal language model with embeddings for at least `n_tokens` tokens. Raises BuildError."""
    origin = part if isinstance(part, str) else f"a {part.config.get('model_type')} with tokenizer {part.tokenizer}"
    if isinstance(part, str):
        refuse_lfs_pointers("language_model", part, "config", "weights")
    try:
        if isinstance(part, RandomLanguageModel):
            config = config_from(part.config, "language_model")
            config.vocab_size = max(n_tokens - 1, part.config.get("vocab_size", 0))
            model = _seeded(part.seed, lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        else:
            model, loaded = AutoModelForCausalLM.from_pretrained(part, dtype=dtype, output_loading_info=True)
            _refuse_missing("language_model", part, loaded["missing_keys"])
    except BuildError:
        raise
    except NOT_LOADED as error:
        raise BuildError(cannot_load("model.language_model", origin, error)) from error
    refuse_unlike_llava(model)
    widen(model, n_tokens)
    return model


@torch.no_grad()
def widen(model: PreTrainedModel, n_tokens: int) -> None:
    """Gives a language model embeddings for at least `n_tokens` tokens, in place.

    New rows are the mean of the old ones: on every rank and in every stage the same.
    """
    n_old = model.get_input_embeddings().num_embeddings
    if n_tokens > n_old:
        model.resize_token_embeddings(n_tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[n_old:] = layer.weight[:n_old].float().mean(dim=0).to(layer.weight.dtype)


def load_vision_tower(part: str | RandomVisionTower, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A vision encoder, of a two-tower model (CLIP, SigLIP) only the vision half. Raises BuildError."""
    if isinstance(part, RandomVisionTower):
        return _seeded(part.seed, lambda: tower_class(config, config.model_type)(config)).to(dtype)
    refuse_lfs_pointers("vision_tower", part, "config", "weights")
    try:
        tower, loaded = tower_class(config, part).from_pretrained(
            part, config=config, dtype=dtype, output_loading_info=True
        )
    except NOT_LOADED as error:
        raise BuildError(cannot_load("model.vision_tower", part, error)) from error
    _refuse_missing("vision_tower", part, loaded["missing_keys"])
    return tower


def _refuse_missing(key: str, part: str, missing: Collection[str]) -> None:
    """Raises BuildError for weights that the file of a part lacks: transformers makes them up, and goes on."""
    if missing:
        raise BuildError(
            f"model.{key}: {part} lacks {len(missing)} of its tensors, such as {min(missing)}; copy it or download it "
            "again, or name another one"
        )


def new_projector(section: ModelSection, config: LlavaConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """A fresh projector. `linear` has an identity, to stay frozen, as its second layer and no activation."""
    projector = _seeded(seed, lambda: LlavaMultiModalProjector(config))
    if section.projector == "linear":
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    return projector.to(dtype)


def join(
    section: ModelSection,
    front: Front,
    language_model: PreTrainedModel,
    vision_tower: PreTrainedModel,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """The parts, and a fresh projector, as one LLaVA model. The parts' own tensors are used, none is copied."""
    config = joined_config(section, front, language_model.config, vision_tower.config)
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


def joined_config(
    section: ModelSection, front: Front, text_config: PreTrainedConfig, vision_config: PreTrainedConfig
) -> LlavaConfig:
    """The configuration of a LLaVA model of these parts."""
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=int(front.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        image_seq_length=front.n_image_tokens,
        projector_hidden_act="linear" if section.projector == "linear" else "gelu",
        vision_feature_select_strategy="default" if section.vision_feature_select == "patch" else "full",
        vision_feature_layer=section.vision_feature_layer,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )


def _generation_config(language_model: PreTrainedModel) -> GenerationConfig:
    """The language model's, less sampling settings that it does not use: Vicuna has some, and cannot be saved with."""
    config = copy.deepcopy(language_model.generation_config)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config


def _seeded(seed: int, make: Any) -> Any:
    """What `make()` returns, its random weights decided by `seed` and no one else's random state touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
