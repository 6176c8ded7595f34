"""4-bit base weights for LoRA (QLoRA, Dettmers et al. 2023, 2305.14314), by bitsandbytes.

The linear layers inside the language model keep their weights as NF4 in blocks of 64, the scales quantized again: 0.516
bytes a weight. Each is dequantized to bf16 where it is used, forward and backward, so that gradients reach the adapters
and the layers below. Embeddings, output layer, norms, projector and vision tower stay in bf16.

What trains beside 4-bit weights learns to make up for their rounding. The result therefore has the rounded weights,
in bf16 (`round_like_nf4`), and computes what training computed; the published weights with the adapter would not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_train.config import TrainableSection
from llava_train.errors import UserError

_NF4: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}


class QuantizeError(UserError):
    """4-bit weights cannot be made here. The message names the key and the mend."""


def is_quantized(section: TrainableSection) -> bool:
    """Whether a stage trains adapters beside 4-bit weights."""
    return section.lora is not None and section.lora.quantize_base is not None


def check_quantization(section: TrainableSection) -> None:
    """Refuses a stage with 4-bit weights where bitsandbytes is missing, before anything is loaded.

    Raises:
        QuantizeError: bitsandbytes cannot be imported.
    """
    if is_quantized(section):
        _bitsandbytes()


@torch.no_grad()
def quantize_base(model: LlavaForConditionalGeneration, device: torch.device) -> None:
    """Puts the language model's linear layers on `device` in NF4, in place, to be trained around and not trained.

    One after the other: the device never holds more than one of them in full, and the host frees it then.

    Raises:
        QuantizeError: bitsandbytes cannot be imported, or a layer that it cannot compute on this device.
    """
    library = _bitsandbytes()
    for parent, name, layer in list(_linear_layers(model)):
        if device.type == "cpu" and layer.in_features % _NF4["blocksize"]:
            raise QuantizeError(
                f"trainable.language_model.lora.quantize_base: {name} has {layer.in_features} inputs; on a CPU "
                f"bitsandbytes misreads weights with no multiple of {_NF4['blocksize']}; use a GPU, or remove the key"
            )
        quantized = library.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type=_NF4["quant_type"],
            device="meta",
        )
        weight = layer.weight.detach().to(torch.bfloat16)
        quantized.weight = library.nn.Params4bit(weight, requires_grad=False, module=quantized, **_NF4).to(device)
        quantized.bias = layer.bias
        # In evaluation it would pack the weights anew for AVX-512, in an order that training cannot read.
        quantized.support_avx512bf16_for_cpu = False
        quantized.register_state_dict_post_hook(_without_statistics)
        quantized.train(layer.training)
        setattr(parent, name, quantized)


@torch.no_grad()
def round_like_nf4(model: LlavaForConditionalGeneration) -> None:
    """Gives the language model's linear layers, on the CPU and in their own dtype, the values that NF4 rounds them to.

    Raises:
        QuantizeError: bitsandbytes cannot be imported.
    """
    functional = _bitsandbytes().functional
    for _, _, layer in _linear_layers(model):
        in_one_row = layer.weight.to(torch.bfloat16).reshape(1, -1)  # blocks go on from row to row
        rounded, state = functional.quantize_4bit(in_one_row, **_NF4)
        layer.weight.copy_(functional.dequantize_4bit(rounded, state).view_as(layer.weight))


def n_weights(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: in 4 bits, a byte holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _linear_layers(model: LlavaForConditionalGeneration) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers inside the language model, without the output layer: parent, name in it, layer."""
    for parent in model.model.language_model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                yield parent, name, layer


def _without_statistics(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the scales out of checkpoints, as DeepSpeed leaves out the frozen weights that they belong to."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise QuantizeError(
            "trainable.language_model.lora.quantize_base: 4-bit weights need bitsandbytes; pip install "
            "'llava_train[qlora]', or remove the key"
        ) from error
    return bitsandbytes
