"""Standardized features: the projector trains on inputs of mean 0 and deviation 1.

An encoder's hidden states are a large constant and a small signal: one layer of DINOv2-small has a mean of 0.4 and
a deviation of 0.1, and some of its features are ten times the others. A projector fed with them learns the constant
first, large features next and small ones last. In standardized coordinates all features count alike (LeCun et al.,
"Efficient BackProp", 1998, section 4.3). For features x of mean m and deviation s

    W (x - m) / s + b  =  (W / s) x  +  (b - (W / s) m)

so the trained layer is folded into a plain one, and what a stage leaves is plain LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlavaForConditionalGeneration

from llava_train.model.trainable import part_module

FIRST_LAYER = "model.multi_modal_projector.linear_1"
_SMALLEST_DEVIATION = 1e-4
"""A feature that never changes is not blown up."""


class StandardizedLinear(nn.Linear):
    """A linear layer that sees (x - mean) / deviation. Both are buffers, so that checkpoints hold them."""

    mean: torch.Tensor  # [in]
    deviation: torch.Tensor  # [in]

    def __init__(self, layer: nn.Linear, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        standardized = (x.float() - self.mean.float()) / self.deviation.float()
        return linear(standardized.to(self.weight.dtype), self.weight, self.bias)


def first_layer(model: LlavaForConditionalGeneration) -> nn.Linear:
    """The projector's layer that the features enter."""
    return model.get_submodule(FIRST_LAYER)


@torch.no_grad()
def feature_statistics(
    model: LlavaForConditionalGeneration, pictures: Iterable[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature that enters the projector.

    Args:
        pictures: pixel values float32 [N, 3, H, W] each.
        device: where to compute; the vision tower and the projector are moved there.

    Returns:
        Two float32 tensors [features], over all patches of all pictures.
    """
    inputs: list[torch.Tensor] = []
    for part in (part_module(model, "projector"), part_module(model, "vision_tower")):
        part.to(device)
    watched = first_layer(model).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
    for pixel_values in pictures:
        model.get_image_features(pixel_values.to(device, model.dtype))
    watched.remove()
    features = torch.cat([part.flatten(0, -2) for part in inputs])
    return features.mean(dim=0), features.std(dim=0).clamp(min=_SMALLEST_DEVIATION)


@torch.no_grad()
def standardize(
    model: LlavaForConditionalGeneration, mean: torch.Tensor, deviation: torch.Tensor, is_new: bool
) -> None:
    """Makes the projector's first layer a `StandardizedLinear`, in place.

    Args:
        mean, deviation: [features], from `feature_statistics`.
        is_new: a new projector keeps its weights, for they suit inputs of deviation 1; a trained one its function.
    """
    layer = first_layer(model)
    weight, bias = layer.weight, layer.bias
    mean, deviation = mean.to(weight.device), deviation.to(weight.device)
    if not is_new:
        bias.copy_(bias.double() + weight.double() @ mean.double())
        weight.copy_(weight.double() * deviation.double())
    model.model.multi_modal_projector.linear_1 = StandardizedLinear(layer, mean, deviation)


def fold(model: LlavaForConditionalGeneration, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`trained` with the weights of a plain first layer, if the model's projector has a standardized one.

    The bias makes up for the weight as it is rounded to its type: the mean's image would drown in the error else.
    """
    layer = first_layer(model)
    if not isinstance(layer, StandardizedLinear):
        return trained
    weight, bias = trained[f"{FIRST_LAYER}.weight"], trained[f"{FIRST_LAYER}.bias"]
    plain = (weight.double() / layer.deviation.cpu().double()).to(weight.dtype)
    plain_bias = (bias.double() - plain.double() @ layer.mean.cpu().double()).to(bias.dtype)
    return {**trained, f"{FIRST_LAYER}.weight": plain, f"{FIRST_LAYER}.bias": plain_bias}
