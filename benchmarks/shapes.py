"""Models of known shapes with random weights, made on the device: nothing is downloaded, nothing read from disk.

    llava = random_llava(stage_config("7b", "lora"), torch.device("cuda"))

The published shapes: Vicuna-7B and CLIP-L/336 (LLaVA-1.5), Qwen2.5-0.5B and -1.5B with SigLIP2-so400m/384. For the
last two "Optimizing VLM Training on One GPU" joins four neighbouring patches each, 729 to 182 image tokens, which LLaVA
does not: `JoinedPatches` does it here, so that the shapes are the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sizes import CLIP_L_336, TINY_LM, TINY_TOWER, VICUNA_7B, sizes
from torch import nn

from llava_train.config import StageConfig
from llava_train.devices import DTYPES
from llava_train.model.build import Llava, join, load_language_model, load_vision_tower, new_projector
from llava_train.model.processor import build_processor
from llava_train.stage_file import parse_stage


@dataclass(frozen=True)
class Shape:
    """A model's parts as transformers configures them, and how large its samples may be."""

    language_model: dict[str, Any]
    vision_tower: dict[str, Any]
    max_sample_tokens: int = 2048
    joined: int = 1
    """Patches that make one image token."""
    precision: str = "bf16"
    min_tokens: int = 0
    """Of a sample."""

    @property
    def n_patches(self) -> int:
        return (self.vision_tower["image_size"] // self.vision_tower["patch_size"]) ** 2

    @property
    def n_image_tokens(self) -> int:
        return self.n_patches // self.joined

    @property
    def has_class_token(self) -> bool:
        return self.vision_tower["model_type"] != "siglip_vision_model"


_SIGLIP2 = sizes("siglip_vision_model", 1152, 4304, 27, 16, image_size=384, patch_size=14)
_DINOV2_S = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 112,
    "patch_size": 14,
}
_QWEN = {"vocab_size": 151_936, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES = {
    "tiny": Shape(
        TINY_LM,
        TINY_TOWER,
        max_sample_tokens=200,
        precision="fp32",
        min_tokens=60,
    ),
    # small, but with heads as large as the CUDA kernels are made for
    "twin": Shape(
        sizes("llama", 256, 512, 4, 4, num_key_value_heads=2),
        sizes("clip_vision_model", 64, 128, 3, 2, image_size=56, patch_size=14),
        max_sample_tokens=300,
        precision="fp32",
        min_tokens=60,
    ),
    # SmolLM2-135M and DINOv2-small: what two CPU cores train
    "small": Shape(
        sizes("llama", 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True),
        _DINOV2_S,
        max_sample_tokens=700,
        precision="fp32",
        min_tokens=90,
    ),
    "0.5b": Shape(
        sizes("qwen2", 896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN), _SIGLIP2, joined=4
    ),
    "1.5b": Shape(
        sizes("qwen2", 1536, 8960, 28, 12, num_key_value_heads=2, tie_word_embeddings=True, **_QWEN),
        _SIGLIP2,
        joined=4,
    ),
    "7b": Shape(VICUNA_7B, CLIP_L_336),
}
TRAINABLE: dict[str, dict[str, Any]] = {
    "stage1": {"projector": {"lr": 1e-3}},
    "full": {"projector": {"lr": 2e-5}, "language_model": {"lr": 2e-5}},
    "lora": {
        "projector": {"lr": 2e-5},
        "language_model": {"lr": 2e-4, "lora": {"rank": 128, "alpha": 256, "dropout": 0.05}},
    },
}


def stage_config(shape_name: str, stage: str, batch: int, max_tokens: int, **engine: Any) -> StageConfig:
    """A stage that trains a shape; `stage` is a key of `TRAINABLE`. Its data set is never opened."""
    shape = SHAPES[shape_name]
    tokens = {"max_tokens": max_tokens, "max_sample_tokens": min(shape.max_sample_tokens, max_tokens)}
    content = {
        "name": f"{shape_name}-{stage}",
        "model": {
            "language_model": {"config": shape.language_model},
            "vision_tower": {"config": shape.vision_tower},
            "vision_feature_select": "patch" if shape.has_class_token else "full",
            "chat_template": "chatml",
        },
        "init_from": "random",
        "trainable": TRAINABLE[stage],
        "data": [{"path": "random"}],
        "batch": {"size": batch, **tokens},
        "engine": {"precision": shape.precision, "activation_checkpointing": "none", **engine},
    }
    return parse_stage(content, f"the shape {shape_name}")


def random_llava(config: StageConfig, device: torch.device) -> Llava:
    """The model of a `stage_config`, its weights drawn on the device: `build.build_llava`, less what needs a CPU."""
    section, dtype, shape = config.model, DTYPES[config.engine.precision], SHAPES[config.name.split("-")[0]]
    front = build_processor(section, config.image)
    with torch.device(device):
        language_model = load_language_model(section.language_model, dtype, len(front.tokenizer))
        vision_tower = load_vision_tower(section.vision_tower, front.vision_config, dtype)
        model = join(section, front, language_model, vision_tower, config.seed)
        llava = Llava(model, front.processor, front.n_image_tokens)
        return _with_joined_patches(llava, config, shape) if shape.joined > 1 else llava


class JoinedPatches(nn.Module):
    """A vision tower that gives `n` neighbouring patches as one, `n` times as wide; what is left over is dropped."""

    def __init__(self, tower: nn.Module, n: int) -> None:
        super().__init__()
        self.tower, self.n = tower, n
        self.config, self.dtype = tower.config, tower.dtype

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> SimpleNamespace:
        hidden_states = self.tower(pixel_values, **options).hidden_states
        return SimpleNamespace(hidden_states=_Joined(hidden_states, self.n))


class _Joined:
    def __init__(self, hidden_states: Any, n: int) -> None:
        self.hidden_states, self.n = hidden_states, n

    def __getitem__(self, layer: int) -> torch.Tensor:
        hidden = self.hidden_states[layer]
        n_images, n_patches, width = hidden.shape
        whole = n_patches // self.n
        return hidden[:, : whole * self.n].reshape(n_images, whole, width * self.n)


def _with_joined_patches(llava: Llava, config: StageConfig, shape: Shape) -> Llava:
    model = llava.model
    wide = copy.deepcopy(model.config)
    wide.vision_config.hidden_size *= shape.joined
    model.model.multi_modal_projector = new_projector(config.model, wide, model.dtype, config.seed)
    model.model.vision_tower = JoinedPatches(model.model.vision_tower, shape.joined)
    return Llava(model, llava.processor, shape.n_image_tokens)
