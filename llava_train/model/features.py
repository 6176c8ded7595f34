"""What the vision tower makes of pictures, before the projector: what a frozen tower need compute only once.

A linear layer rounds otherwise where its input has gaps in memory (two steps, product and sum, in place of one), and
without the class token hidden states have gaps. So features are laid out without gaps always, computed or read back.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import cast

import torch
import xxhash
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_train.model.build import Llava
from llava_train.model.trainable import part_module

_DECISIVE_PACKAGES = ("torch", "transformers", "pillow", "numpy")
"""What decodes, scales and computes: another version may round otherwise."""
_VERSION = 2
"""Raise it when `encode` computes otherwise, or `decode_image` gives other pixels: old caches are not read then.

2: transparent parts of pictures are laid on white.
"""


def vision_tower_of(model: LlavaForConditionalGeneration) -> PreTrainedModel:
    return cast(PreTrainedModel, part_module(model, "vision_tower"))


def encode(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What enters the projector: [N, image tokens, features], the selected layers joined.

    Args:
        pixel_values: [N, 3, H, W] of any dtype, on the tower's device.
    """
    tower, layers = vision_tower_of(model), model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    # All of them: transformers 5.17, the oldest that we take, knows no choice of layers counted from the end.
    states = tower(pixel_values.to(tower.dtype), output_hidden_states=True, return_dict=True).hidden_states
    start = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[layer][:, start:] for layer in layers], dim=-1).contiguous()


def project(model: LlavaForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """What the projector makes of features [N, image tokens, features]: [N * image tokens, hidden size]."""
    return part_module(model, "projector")(features).flatten(0, 1)


def feature_shape(llava: Llava) -> tuple[int, int]:
    """Image tokens and features of one picture, as `encode` gives them."""
    layers = llava.model.config.vision_feature_layer
    n_layers = 1 if isinstance(layers, int) else len(layers)
    return llava.n_image_tokens, n_layers * llava.model.config.vision_config.hidden_size


def encoder_hash(llava: Llava, device_type: str) -> str:
    """One word for all that decides the features of a picture's bytes.

    The tower's weights in training precision and its configuration, the selected layers, how pictures are prepared,
    and who computes: kind of device and versions. GPUs of two kinds may still differ in the last bit.
    """
    model, digest = llava.model, xxhash.xxh3_128()
    tower = vision_tower_of(model)
    stated = {
        "version": _VERSION,
        "tower": {key: value for key, value in tower.config.to_dict().items() if key != "_name_or_path"},
        "attention": tower.config._attn_implementation,
        "layers": model.config.vision_feature_layer,
        "select": model.config.vision_feature_select_strategy,
        "image": llava.processor.image_processor.to_dict(),
        "device": device_type,
        **{name: version(name) for name in _DECISIVE_PACKAGES},
    }
    digest.update(json.dumps(stated, sort_keys=True, default=str).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
