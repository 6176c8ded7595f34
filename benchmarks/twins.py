"""A device against the CPU: logits, losses and gradients of one small model with the same weights on the same pack.

The reference is float32 on the CPU. bf16 rounds, on any device: the CPU's own bf16 says by how much, and the device may
be `SLACK` times as far from the reference. Errors are relative: |x - reference| / |reference| over all elements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from rig import draw_pack
from shapes import SHAPES, random_llava, stage_config
from transformers import LlavaForConditionalGeneration

from llava_train.data.loader import PackedBatch
from llava_train.devices import cast_parameters
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import set_trainable

KERNELS = ("eager", "compile", "liger")
SLACK = 2.0
FLOOR = 2e-3
"""What errors may be in any case: where both are tiny their ratio says nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a pack, on the CPU in float32."""

    logits: torch.Tensor
    losses: torch.Tensor
    gradient: torch.Tensor
    """Of all trainable parameters, end to end."""

    def errors(self, reference: Outcome) -> dict[str, float]:
        return {name: error(getattr(self, name), getattr(reference, name)) for name in vars(self)}


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def twin_model() -> LlavaForConditionalGeneration:
    """A small model with grouped heads of 64, in float32 with weights that bf16 holds exactly, on the CPU."""
    config = stage_config("twin", "full", 6, 2048, zero=0)
    model = random_llava(config, torch.device("cpu")).model
    set_trainable(model, config.trainable)
    cast_parameters(model, torch.bfloat16)
    cast_parameters(model, torch.float32)
    return model.train()


def twin_pack(model: LlavaForConditionalGeneration) -> PackedBatch:
    """A pack of six documents for it, most of them with a picture."""
    return draw_pack(model, "twin", n_samples=6)


def outcome(
    model: LlavaForConditionalGeneration,
    pack: PackedBatch,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[LlavaForConditionalGeneration], Any] = lambda model: None,
) -> Outcome:
    """A copy of the model on a device; `prepare` may change its kernels."""
    twin = copy.deepcopy(model).to(device)
    cast_parameters(twin, dtype)
    prepare(twin)
    run, pack = PackedLoss(twin), pack.to(device)
    loss, losses = run(**hidden_inputs(pack), predictors=pack.predictors, targets=pack.targets)
    loss.backward()
    with torch.no_grad():
        logits = twin.lm_head(run.hidden_states(**hidden_inputs(pack))[0, pack.predictors])
    gradients = [parameter.grad.flatten() for parameter in twin.parameters() if parameter.grad is not None]
    return Outcome(*(tensor.detach().float().cpu() for tensor in (logits, losses, torch.cat(gradients))))


def compare(device: torch.device, kernels: Sequence[str]) -> dict[str, Any]:
    """Errors of the device in bf16 with each of the kernels, and whether all are within bounds.

    Also of a pack against its documents alone, both on the device. Kernels that are not installed are left out.
    """
    model, cpu = twin_model(), torch.device("cpu")
    pack = twin_pack(model)
    reference = outcome(model, pack, cpu, torch.float32)
    rounding = outcome(model, pack, cpu, torch.bfloat16).errors(reference)
    found: dict[str, Any] = {"cpu bf16": rounding}
    for name in kernels:
        if name == "liger" and find_spec("liger_kernel") is None:
            continue
        prepare = partial(use_kernels, kernels=name, device=device, zero=0)
        found[name] = outcome(model, pack, device, torch.bfloat16, prepare).errors(reference)
    found["pack against documents"] = {"logits": pack_error(model, pack, device)}
    bounds = {name: max(SLACK * value, FLOOR) for name, value in rounding.items()}
    found["ok"] = all(value <= bounds[name] for errors in [*found.values()][1:] for name, value in errors.items())
    return found


@torch.no_grad()
def pack_error(model: LlavaForConditionalGeneration, pack: PackedBatch, device: torch.device) -> float:
    """How far the last hidden states of a pack are from those of its documents alone, in bf16 on a device."""
    twin = copy.deepcopy(model).to(device)
    cast_parameters(twin, torch.bfloat16)
    run, pack = PackedLoss(twin), pack.to(device)
    alone = [run.hidden_states(**inputs) for inputs in documents_of(twin, pack)]
    return error(run.hidden_states(**hidden_inputs(pack)).cpu(), torch.cat(alone, dim=1).cpu())


def documents_of(model: LlavaForConditionalGeneration, pack: PackedBatch) -> Iterator[dict[str, Any]]:
    """The inputs of each document of a pack alone."""
    shape, pixels = SHAPES["twin"], pack.pixel_values
    split = (tensor.split(pack.lengths, dim=1) for tensor in (pack.input_ids, pack.position_ids))
    for ids, positions in zip(*split, strict=True):
        n_images = int((ids == model.config.image_token_id).sum()) // shape.n_image_tokens
        own, pixels = pixels[: max(1, n_images)], pixels[n_images:]
        borders = torch.tensor([0, ids.numel()], dtype=torch.int32, device=ids.device)
        yield {
            "input_ids": ids,
            "position_ids": positions,
            "pixel_values": own if len(own) else pack.pixel_values[:1],
            "n_images": n_images,
            "cu_seqlens": borders,
            "lengths": (ids.numel(),),
        }


def hidden_inputs(pack: PackedBatch) -> dict[str, Any]:
    names = ("input_ids", "position_ids", "pixel_values", "n_images", "cu_seqlens", "lengths")
    return {name: getattr(pack, name) for name in names}
