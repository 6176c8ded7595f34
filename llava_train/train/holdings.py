"""What weights, gradients and the optimizer hold on a device, by DeepSpeed's optimizer of each ZeRO stage.

Pure arithmetic over numbers of parameters. It follows what DeepSpeed 0.19 allocates (`FP16_UnfusedOptimizer`,
`BF16_Optimizer`, `DeepSpeedZeroOptimizer`, `DeepSpeedZeroOptimizer_Stage3`) and was compared with the allocations of
their steps, byte by byte of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_train.config import PARTS, EngineSection, Part
from llava_train.devices import DTYPES
from llava_train.model.trainable import part_of
from llava_train.train.engine import BUCKET_ELEMENTS

_FP32, _MOMENTS = 4, 8
_LIVE_ELEMENTS, _FETCHED_ELEMENTS, _PERSISTENT_ELEMENTS = 10**9, 5 * 10**7, 10**5
"""DeepSpeed's `stage3_max_live_parameters`, `stage3_prefetch_bucket_size`, `stage3_param_persistence_threshold`."""
_ALLREDUCE_ELEMENTS = 5 * 10**8
"""Gradients that DeepSpeed joins for one all-reduce where ZeRO does not."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in 4 bits: a scale of a byte for each block of 64, a float32 scale for each 256 of those."""


@dataclass(frozen=True)
class PartSize:
    """Numbers of parameters of a part."""

    n_frozen: int
    n_trainable: int
    n_quantized: int = 0
    """Of the frozen ones, those kept in 4 bits."""

    @property
    def n_all(self) -> int:
        return self.n_frozen + self.n_trainable


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters of a model."""

    parts: dict[Part, PartSize]
    n_small: int
    """In tensors so small that ZeRO 3 keeps them whole."""
    largest: int
    """In the largest tensor that trains."""
    largest_quantized: int = 0
    """In the largest matrix that is kept in 4 bits."""

    @property
    def n_trainable(self) -> int:
        return sum(part.n_trainable for part in self.parts.values())

    @property
    def n_all(self) -> int:
        return sum(part.n_all for part in self.parts.values())


@dataclass(frozen=True)
class Held:
    """Bytes on a device, beside activations."""

    weights: dict[Part, int]
    gradients: int
    optimizer: int
    """Float32 weights and the two moments of AdamW."""
    buckets: int
    """Where gradients wait to be reduced; under ZeRO 3 also small weights that every rank keeps whole."""
    reducing: int
    """Copies while a bucket is reduced."""
    reduces_in_backward: bool
    """Whether a bucket may be full while activations are still there."""
    gathered: int = 0
    """Weights of other ranks that live here for a while (ZeRO 3)."""
    fetching: int = 0
    """Copies while they arrive, and the bf16 copy of a matrix in 4 bits while it is used."""
    stepping: int = 0
    """What the optimizer's step adds while it runs."""
    on_host: int = 0
    """Offloaded, in the host's memory."""


def size_of(model: LlavaForConditionalGeneration, quantize_base: bool = False) -> ModelSize:
    """Counts the parameters of a model or skeleton; tied ones count once."""
    quantized: set[torch.Tensor] = set()
    if quantize_base:
        layers = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
        quantized = {layer.weight for layer in layers if not layer.weight.requires_grad}
    named = list(model.named_parameters())
    parts: dict[Part, PartSize] = {}
    for part in PARTS:
        own = [parameter for name, parameter in named if part_of(name) == part]
        parts[part] = PartSize(
            sum(parameter.numel() for parameter in own if not parameter.requires_grad),
            sum(parameter.numel() for parameter in own if parameter.requires_grad),
            sum(parameter.numel() for parameter in own if parameter in quantized),
        )
    sizes = [parameter.numel() for _, parameter in named]
    largest = max(parameter.numel() for _, parameter in named if parameter.requires_grad)
    in_4_bits = max((parameter.numel() for parameter in quantized), default=0)
    return ModelSize(parts, sum(n for n in sizes if n <= _PERSISTENT_ELEMENTS), largest, in_4_bits)


def held_bytes(size: ModelSize, engine: EngineSection, n_ranks: int) -> Held:
    """What a stage holds on each device, in bytes."""
    make = (_without_zero, _zero1, _zero2, _zero3)[engine.zero]
    held = make(size, DTYPES[engine.precision].itemsize, n_ranks, engine)
    if engine.zero < 3:
        return replace(held, fetching=size.largest_quantized * DTYPES["bf16"].itemsize)
    return replace(held, weights=dict.fromkeys(held.weights, 0)) if engine.offload_parameters else held


def _whole(size: ModelSize, width: int) -> dict[Part, int]:
    def of(part: PartSize) -> int:
        return (part.n_all - part.n_quantized) * width + int(part.n_quantized * _NF4_BYTES)

    return {name: of(part) for name, part in size.parts.items()}


def _bucket(size: ModelSize) -> int:
    return min(BUCKET_ELEMENTS, size.n_trainable)


def _without_zero(size: ModelSize, width: int, n_ranks: int, engine: EngineSection) -> Held:
    n = size.n_trainable
    joined = min(n, _ALLREDUCE_ELEMENTS + size.largest)
    own_weights = _FP32 if width < _FP32 else 0  # in float32 the optimizer works on the model's
    return Held(
        weights=_whole(size, width),
        gradients=n * width,
        optimizer=n * (own_weights + _MOMENTS),
        buckets=0,
        reducing=joined * width,
        reduces_in_backward=False,
        stepping=n * own_weights,  # gradients in float32
    )


def _zero1(size: ModelSize, width: int, n_ranks: int, engine: EngineSection) -> Held:
    n, bucket = size.n_trainable, _bucket(size)
    if width < _FP32 and not engine.offload_optimizer:  # BF16_Optimizer: gradients whole, in both precisions
        joined = min(n, _ALLREDUCE_ELEMENTS + size.largest)
        return Held(
            weights=_whole(size, width),
            gradients=n * (width + _FP32),
            optimizer=n * (_FP32 + _MOMENTS) // n_ranks,
            buckets=0,
            reducing=joined * (_FP32 + width),
            reduces_in_backward=False,
        )
    held = Held(
        weights=_whole(size, width),
        gradients=n * _FP32,
        optimizer=n * (_FP32 + _MOMENTS) // n_ranks,
        buckets=bucket * _FP32,
        reducing=bucket * (_FP32 if engine.offload_optimizer and width < _FP32 else _FP32 // 2) * (n_ranks > 1),
        reduces_in_backward=bucket < n,
    )
    return _offloaded(held, size, width, n_ranks) if engine.offload_optimizer else held


def _zero2(size: ModelSize, width: int, n_ranks: int, engine: EngineSection) -> Held:
    n, bucket, fp32 = size.n_trainable, _bucket(size), width == _FP32
    held = Held(
        weights=_whole(size, width),
        gradients=n * (2 * _FP32 if fp32 else _FP32) // n_ranks,
        optimizer=n * (_FP32 + _MOMENTS) // n_ranks,
        buckets=bucket * width,
        reducing=bucket * width * (n_ranks > 1 or not fp32),
        reduces_in_backward=bucket < n,
    )
    if not engine.offload_optimizer:
        return held
    held = replace(held, reducing=2 * held.reducing)
    return _offloaded(held, size, width, n_ranks)


def _zero3(size: ModelSize, width: int, n_ranks: int, engine: EngineSection) -> Held:
    n, bucket = size.n_trainable, _bucket(size)
    alone = n_ranks == 1
    small = 0 if alone else size.n_small * width
    whole = _whole(size, width)
    divided = {part: n_bytes // n_ranks for part, n_bytes in whole.items()}
    n_whole = sum(whole.values())
    travels = max(0, n_whole - size.n_small * width) * (not alone or engine.offload_parameters)
    host = n * (_FP32 + _MOMENTS + 2 * _FP32) // n_ranks
    return Held(
        weights=divided,
        gradients=0 if engine.offload_optimizer else n * _FP32 // n_ranks,
        optimizer=0 if engine.offload_optimizer else n * (_FP32 + _MOMENTS) // n_ranks,
        buckets=bucket * width + small,
        reducing=bucket * (2 * _FP32 if width == _FP32 else width + _FP32 // n_ranks),
        reduces_in_backward=bucket < n,
        gathered=min(travels, _LIVE_ELEMENTS * width),
        fetching=min(travels, _FETCHED_ELEMENTS * width),
        on_host=(host if engine.offload_optimizer else 0) + (n_whole // n_ranks if engine.offload_parameters else 0),
    )


def _offloaded(held: Held, size: ModelSize, width: int, n_ranks: int) -> Held:
    """ZeRO 1 and 2 with the optimizer in the host's memory, beside copies of its weights and gradients."""
    n_own = size.n_trainable // n_ranks
    copies = n_own * (width + _FP32) + size.largest * width
    return replace(
        held,
        optimizer=0,
        buckets=held.buckets + size.largest * width,
        on_host=held.optimizer + copies,
    )
