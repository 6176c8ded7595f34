"""When memory runs out: what was being done, what takes the memory, and which keys to change to which values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_train.config import StageConfig
from llava_train.data.loader import PackedBatch
from llava_train.errors import UserError
from llava_train.model.recompute import Recompute
from llava_train.train.memory import Estimator, gib
from llava_train.train.remedies import find_remedy
from llava_train.train.world import World

_BELIEVED = 0.85
"""Where an estimate was too low, a remedy has to promise so much less than it."""


class RanOut(RuntimeError):
    """Memory ran out in an activity that is told in words; the cause is PyTorch's own error."""


class OutOfMemory(UserError):
    """A device's memory is too small for the stage. The message names the keys to change."""

    on_every_rank = False


@contextmanager
def noted(activity: str, *packs: PackedBatch) -> Iterator[None]:
    """Memory that runs out inside is told with what was being done, and the greatest pack there was."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        greatest = max(packs, key=lambda pack: pack.input_ids.numel(), default=None)
        size = "" if greatest is None else f": a pack of {greatest.input_ids.numel():,} tokens, "
        size += "" if greatest is None else f"{greatest.n_images:,} images, {greatest.n_supervised:,} supervised tokens"
        raise RanOut(activity + size) from error


@contextmanager
def advised(
    world: World, estimator: Estimator, config: StageConfig, recompute: Recompute, budget: int
) -> Iterator[None]:
    """Turns memory that runs out inside into `OutOfMemory`, on the rank where it did.

    Args:
        recompute: the way of activation checkpointing that the run took.
        budget: bytes that a step may take on each device.
    """
    try:
        yield
    except (RanOut, torch.OutOfMemoryError) as error:
        raise OutOfMemory(advice(error, world, estimator, config, recompute, budget)) from None


def advice(
    error: RuntimeError,
    world: World,
    estimator: Estimator,
    config: StageConfig,
    recompute: Recompute,
    budget: int,
) -> str:
    """At most eight lines."""
    doing = str(error) if isinstance(error, RanOut) else "training"
    told = estimator.estimate(config, recompute)
    kinds = ", ".join(f"{kind} {gib(n_bytes)}" for kind, n_bytes in told.by_kind().items())
    remedy = find_remedy(estimator, config, recompute, min(budget, int(_BELIEVED * told.total_bytes)))
    lines = [
        f"{config.name}: the memory of rank {world.rank} ({world.device}) ran out in {doing}",
        f"PyTorch says: {_first_sentence(error.__cause__ or error)}",
        f"estimated for the heaviest pack ({told.pack}), activation_checkpointing {recompute}, "
        f"ZeRO {config.engine.zero}, {world.n_ranks} ranks: {gib(told.total_bytes)} of {gib(budget)}",
        f"of that: {kinds}",
        f"change: {remedy}" if remedy else "no change of keys makes it fit, by the estimate: take more or larger GPUs",
    ]
    if remedy and "batch.max_tokens" in remedy.changes[0]:
        lines.append("batch.max_tokens changes no result; nor do activation_checkpointing, zero and the offload keys")
    return "\n".join(lines)


def _first_sentence(error: BaseException) -> str:
    return str(error.args[0] if error.args else error).split(". ")[0].splitlines()[0]
