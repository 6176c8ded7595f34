"""What the vision tower makes of pictures, before the projector: what a frozen tower need compute only once.

A linear layer rounds otherwise where its input has gaps in memory (two steps, product and sum, in place of one), and
without the class token hidden states have gaps. So features are laid out without gaps always, computed or read back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from typing import cast

import torch
import xxhash
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_train.model.build import Llava
from llava_train.model.recompute import layers_of
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
    n_states = len(layers_of(tower)) + 1
    numbers = [layer % n_states for layer in layers]
    with _kept_states(tower, frozenset(numbers)) as states:
        tower(pixel_values.to(tower.dtype))
    start = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[number][:, start:] for number in numbers], dim=-1).contiguous()


@contextmanager
def _kept_states(tower: PreTrainedModel, wanted: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keeps the wanted hidden states of a tower that runs inside; the others are freed on the way.

    Number 0 is the input of the first layer, number n the output of the n-th. transformers would keep all of them: 25
    of CLIP-L, 830 MB for 28 pictures. Its own choice of single ones means other layers before version 5.23.
    """
    states: dict[int, torch.Tensor] = {}

    def keep(number: int, layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if number == 1 and 0 in wanted:
            states[0] = inputs[0]
        if number in wanted:
            states[number] = output

    with ExitStack() as hooks:
        for number, layer in enumerate(layers_of(tower), start=1):
            hooks.enter_context(layer.register_forward_hook(partial(keep, number)))
        yield states


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
