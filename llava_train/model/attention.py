"""Attention over packs: each document of a pack attends to itself alone.

Registered with transformers under the name `packed`. On CUDA in bf16 or fp16 one variable-length kernel runs
over the whole pack (flash-attn where it is installed, else `torch.nn.attention.varlen`); elsewhere attention runs
document by document. No T x T mask is ever built, and the borders come as an argument: reading them from
`position_ids`, as transformers would, stalls the device in every layer. `torch.compile` looks neither into this
attention nor into `Documents`: with the lengths as plain arguments every pack would be compiled anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_train.model import cpu_attention

PACKED = "packed"
"""Name of this attention in transformers' attention interface."""

Lengths = tuple[int, ...]

_NOT_COMPUTED = ("s_aux", "softcap", "position_bias")
"""Arguments by which models of transformers ask for sinks, capped scores and biases."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin and end."""

    borders: torch.Tensor
    """int32 [D + 1], on the device of the pack: the `cu_seqlens` of the kernels."""
    lengths: Lengths
    """Their D lengths, as Python ints: asking the device for them would stall it."""


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a pack.

    A token sees those before it, with `sliding_window` w the last w alone, itself included.

    Args:
        query: [1, heads, T, head size]; key and value: [1, key-value heads, T, head size].
        attention_mask: always None.
        documents: their lengths add up to T.

    Returns:
        [1, T, heads, head size], and None for the weights.

    Raises:
        NotImplementedError: a kind of attention that is not computed here.
    """
    assert attention_mask is None, "packs need no mask"
    asked = [name for name in _NOT_COMPUTED if others.get(name) is not None]
    if asked or dropout:
        raise NotImplementedError(f"packed attention computes no {', '.join(asked) or 'dropout'}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        longest = max(documents.lengths)
        output = varlen_kernel()(query, key, value, documents.borders, longest, scaling, sliding_window)
    else:
        output = attend_by_document(query, key, value, documents.lengths, scaling, sliding_window)
    return output, None


def attend_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    scaling: float | None,
    window: int | None = None,
    like_cuda: bool = False,
) -> torch.Tensor:
    """Attention of each document, one after the other. Shapes as `packed_attention`.

    Args:
        like_cuda: not as a CPU computes short documents.
    """
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(q, k, v, scaling, window, like_cuda) for q, k, v in documents]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    like_cuda: bool,
) -> torch.Tensor:
    length, mask, on_cpu = query.shape[2], None, query.device.type == "cpu" and not like_cuda
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    elif on_cpu and length <= cpu_attention.LONGEST:
        return cpu_attention.attend(query, key, value, scaling)
    dtype, repeats = query.dtype, query.shape[1] // key.shape[1]
    if repeats > 1 and not on_cpu:  # CUDA's kernel for float32 knows no groups: all scores would be kept instead
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    # In float32: on a CPU the backward pass is up to three times as fast as in bfloat16.
    query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scaling, "enable_gqa": grouped}
    return scaled_dot_product_attention(query, key, value, **options).to(dtype)


VarlenKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float | None, int | None], torch.Tensor
]


@lru_cache(maxsize=1)
def varlen_kernel() -> VarlenKernel:
    """The variable-length kernel of this machine, with the shapes of `packed_attention`."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return attend_with_torch()

    def attend(query, key, value, borders, longest, scaling, window):  # type: ignore[no-untyped-def]
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        options = {"softmax_scale": scaling, "causal": True, "window_size": _left_of(window, longest)}
        return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, **options)[None]

    return attend


def attend_with_torch() -> VarlenKernel:
    """PyTorch's own variable-length kernel. It has shapes, and no values, elsewhere than on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(query, key, value, borders, longest, scaling, window):  # type: ignore[no-untyped-def]
        options: dict[str, Any] = {"scale": scaling, "window_size": _left_of(window, longest)}
        if query.shape[1] != key.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
        assert isinstance(output, torch.Tensor)
        return output[None]

    return attend


def _left_of(window: int | None, longest: int) -> tuple[int, int]:
    """A window as the kernels want it: tokens to the left and to the right, -1 for all."""
    return (window - 1 if window is not None and window < longest else -1, 0)


# No mask function goes with it: transformers then makes no mask. With one it reads position_ids first, and waits for
# the device to know whether they restart.
AttentionInterface.register(PACKED, packed_attention)
