"""Activation checkpointing: what the forward pass keeps for the backward pass, and what is computed again.

`none` keeps everything that autograd wants. `full` keeps the input of each layer (Chen et al., 1604.06174).
`selective` keeps the results of matrix products and attention, which are dear, and computes the rest of a layer
again: norms, rotations, activation functions, additions (Korthikanti et al., 2205.05198). No result changes: the
same operations run on the same inputs, dropout from the same random state.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the fastest to the one that takes the least memory."""

KEPT = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten.convolution.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_fused_attention_overrideable.default",
        "torch_attn._varlen_attn.default",
        "flash_attn._flash_attn_varlen_forward.default",
    }
)
"""Operators whose results `selective` keeps, by their names: some exist only where a package is installed."""


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Returns the transformer layers of a model of transformers, in the order in which they run."""
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def enable_recompute(module: PreTrainedModel, recompute: Recompute) -> None:
    """Sets what a model of transformers computes again in its backward pass, layer by layer, in training mode."""
    if recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        settings["context_fn"] = _selective_contexts
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(settings)
    else:  # transformers before 5.23, which is what Python 3.10 gets
        module.gradient_checkpointing_enable(settings)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *arguments: Any, **settings: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
