"""What trains: freezing, LoRA, parameter groups.

`trainable:` of the stage file alone decides. A part that it lists trains at its own learning rate, every other
part is frozen. With `lora:` the language model's own weights stay frozen and adapters train in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_train.config import PARTS, LoraSection, Part, TrainableSection
from llava_train.model.quantize import n_weights


@dataclass(frozen=True)
class PartSummary:
    """A line of the table that a run prints."""

    part: Part
    n_parameters: int
    n_trainable: int
    dtype: torch.dtype
    lr: float | None
    """None when frozen."""
    lora: bool = False


def set_trainable(model: LlavaForConditionalGeneration, section: TrainableSection, seed: int = 0) -> PeftModel | None:
    """Freezes and unfreezes the parameters of a model in place, adapters added where asked.

    Args:
        model: its parts' parameters may be in any state.
        section: what trains.
        seed: of the adapters' weights.

    Returns:
        peft's handle on the adapters, None without LoRA. `model` itself holds the adapters too.
    """
    model.requires_grad_(False)
    rates = section.learning_rates()
    for part in rates:
        if not (part == "language_model" and section.lora):
            part_module(model, part).requires_grad_(True)
    if "language_model" in rates and not section.lora:
        model.lm_head.requires_grad_(True)
    if "projector" in rates and is_linear(model):
        model.model.multi_modal_projector.linear_2.requires_grad_(False)
    if "vision_tower" in rates:
        _freeze_unused(model)
    return add_lora(model, section.lora, seed) if section.lora else None


def add_lora(model: LlavaForConditionalGeneration, section: LoraSection, seed: int) -> PeftModel:
    """Adds trainable adapters to every linear layer of the language model, in its own dtype.

    The layers are named by their full path: a suffix such as `q_proj` would also hit the vision tower.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    language_model = part_module(model, "language_model")
    layers = [
        f"model.language_model.{name}"
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    config = LoraConfig(r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)  # peft froze everything but its adapters
        if ".lora_" in name:
            parameter.data = parameter.data.to(language_model.dtype)
    return peft_model


def part_module(model: LlavaForConditionalGeneration, part: Part) -> nn.Module:
    return {
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
        "vision_tower": model.model.vision_tower,
    }[part]


def part_of(name: str) -> Part:
    """The part that a parameter of `LlavaForConditionalGeneration` belongs to, from its name."""
    if "multi_modal_projector." in name:
        return "projector"
    return "vision_tower" if "vision_tower." in name else "language_model"


def is_linear(model: LlavaForConditionalGeneration) -> bool:
    """Whether the projector is LLaVA v1's single layer (`build.new_projector`)."""
    return bool(model.config.projector_hidden_act == "linear")


def parameter_groups(model: nn.Module, section: TrainableSection, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: by part, matrices with weight decay, biases and norms without.

    Each group holds `name`, `params`, `lr`, `weight_decay`, and `peak_lr`, from which schedules compute `lr`.
    """
    rates = section.learning_rates()
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "name": part if decayed else f"{part} (no decay)",
            "params": parameters,
            "lr": rates[part],
            "peak_lr": rates[part],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (part, decayed), parameters in groups.items()
    ]


def summarize(model: LlavaForConditionalGeneration, section: TrainableSection) -> Iterator[PartSummary]:
    """A summary of each part. Call it before DeepSpeed partitions the parameters."""
    rates = section.learning_rates()
    named = list(model.named_parameters())
    for part in PARTS:
        parameters = [parameter for name, parameter in named if part_of(name) == part]
        yield PartSummary(
            part=part,
            n_parameters=sum(map(n_weights, parameters)),
            n_trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            dtype=parameters[0].dtype,
            lr=rates.get(part),
            lora=part == "language_model" and section.lora is not None,
        )


def _freeze_unused(model: LlavaForConditionalGeneration) -> None:
    """Freezes what the features don't depend on, such as the layers above `vision_feature_layer`.

    They are found by a backward pass: ZeRO would wait for their gradients.
    """
    tower = part_module(model, "vision_tower")
    size = model.config.vision_config.image_size
    pixels = torch.zeros(1, 3, size, size, dtype=model.dtype, device=model.device)
    model.get_image_features(pixels).pooler_output[0].float().sum().backward()
    for parameter in tower.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)
