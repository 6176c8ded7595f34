"""The norm of a step's gradient, whole and by part of the model.

DeepSpeed finds the norm of each parameter group on its way to that of all: it is kept, so that nothing is computed for
it (but in ZeRO 1 with bf16) and no message is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

Piece = tuple[str, torch.Tensor]
"""A part of the model, and the norm of some of its gradient, over all ranks."""


@dataclass(frozen=True)
class GradNorm:
    """Of a step's gradient before clipping, over all ranks; on the device, so that no step waits for it."""

    whole: torch.Tensor | float
    pieces: Sequence[Piece] = ()
    """What `whole` is made of, where it is finite."""

    def __float__(self) -> float:
        return float(self.whole)

    def of_part(self, part: str) -> float:
        """NaN where the whole is not finite: DeepSpeed computes no others then. Waits for the device."""
        norms = [norm for name, norm in self.pieces if name == part]
        if not math.isfinite(self.whole):
            return math.nan
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def keep_group_norms(optimizer: Any) -> None:
    """Makes an optimizer of ZeRO keep the norm of each of its groups, for `taken_group_norms`."""
    optimizer.group_norms = []
    if isinstance(optimizer, BF16_Optimizer):  # of ZeRO 1 in bf16, which finds the norm of all at once
        optimizer.get_grads_for_norm = _measured(optimizer)
        return
    for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
        setattr(optimizer, name, _kept(getattr(optimizer, name), optimizer.group_norms))


def taken_group_norms(optimizer: Any) -> list[Piece]:
    """What `optimizer` kept since the last call. ZeRO 3 cuts groups into smaller ones."""
    norms, whose = list(optimizer.group_norms), getattr(optimizer, "sub_group_to_group_id", {})
    optimizer.group_norms.clear()
    names = [group["name"].split(" ")[0] for group in optimizer.param_groups]  # "projector (no decay)"
    return [(names[whose.get(number, number)], norm) for number, norm in enumerate(norms)]


def _kept(function: Callable[..., torch.Tensor], into: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, which also puts what it returns into a list."""

    @wraps(function)
    def keeping(*arguments: Any, **options: Any) -> torch.Tensor:
        into.append(found := function(*arguments, **options))
        return found

    return keeping


def _measured(optimizer: Any) -> Callable[..., Any]:
    """`get_grads_for_norm`, which also puts the norm of each group into `group_norms`."""
    find = optimizer.get_grads_for_norm

    def measuring(for_clipping: bool = False) -> Any:
        if not for_clipping:
            optimizer.group_norms.extend(map(torch.linalg.vector_norm, optimizer.fp32_groups_gradients_flat))
        return find(for_clipping)

    return measuring
