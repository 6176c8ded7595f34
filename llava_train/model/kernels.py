"""What computes the layers beside matrix products and attention: `engine.kernels` of the stage file.

Norms, rotary embeddings and gates are many small operations that only move memory. `compile` lets torch.compile make
one of several, a layer at a time: all layers of a kind share one compilation, in a minute at most, and packs of any
length share it too. `liger` puts the kernels of liger-kernel in their place. They do not add up, so it is one of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_train.errors import UserError
from llava_train.model.recompute import layers_of


def use_kernels(model: LlavaForConditionalGeneration, kernels: str, device: torch.device, zero: int) -> None:
    """Prepares a model, adapters and all, in place, before DeepSpeed takes it.

    Args:
        kernels: `eager`, `compile` or `liger`.
        zero: stage of ZeRO.

    Raises:
        UserError: they cannot be used here.
    """
    check_kernels(kernels, device)
    if kernels == "compile":
        _compile_layers(model, zero)
    elif kernels == "liger":
        _use_liger(model.model.language_model)


def check_kernels(kernels: str, device: torch.device) -> None:
    """Refuses, before a model is loaded, kernels that cannot run here. Raises UserError."""
    if kernels != "liger":
        return
    if device.type != "cuda":
        raise UserError("engine.kernels: the kernels of liger need a CUDA device; choose eager or compile")
    if find_spec("liger_kernel") is None:
        raise UserError("engine.kernels: liger needs a package; pip install liger-kernel")


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Runs compiled layers as they were written: what is run now and then (evaluation) is not worth compiling for."""
    compiled = {layer: vars(layer).pop("forward") for layer in layers_of(model) if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in compiled.items():
            layer.forward = forward


def _compile_layers(model: LlavaForConditionalGeneration, zero: int) -> None:
    layers = layers_of(model)
    for layer in layers:
        layer.forward = _compiled_forward(layer)
    if zero == 3:  # fetched as a whole, for the hooks of its parts would cut it into pieces
        set_z3_leaf_modules(model, list({type(layer) for layer in layers}))


def _compiled_forward(layer: Any) -> Callable[..., Any]:
    """Returns the forward pass of a layer, compiled, with activation checkpointing around it where it is enabled.

    transformers 5.23 checkpoints inside `forward`, and torch.compile compiles nothing that torch.utils.checkpoint
    calls. So here the checkpoint calls what is compiled.
    """
    if "__call__" in vars(GradientCheckpointingLayer):  # transformers before 5.23 checkpoints there, around `forward`
        return torch.compile(layer.forward, dynamic=True)
    wrapped: Any = type(layer).forward
    written = wrapped.__wrapped__  # the model's own forward, without the checkpointing around it
    compiled = torch.compile(MethodType(written, layer), dynamic=True)

    def forward(*arguments: Any, **settings: Any) -> Any:
        if layer.gradient_checkpointing and layer.training:
            checkpoint: Any = layer._gradient_checkpointing_func
            return checkpoint(partial(compiled, **settings), *arguments)
        return compiled(*arguments, **settings)

    return forward


def _use_liger(language_model: PreTrainedModel) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    model_type = language_model.config.model_type
    if model_type not in known:
        raise UserError(f"engine.kernels: liger has no kernels for a {model_type}; choose eager or compile")
    module = vars(sys.modules[type(language_model).__module__])
    before = dict(module)
    # The loss is ours: theirs multiplies the rows of ignored tokens too. Rotary embeddings belong to the module.
    without = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(language_model, **without)
    module.update(before)  # it also replaces the classes of all models to come: of the next stage, and of the result
