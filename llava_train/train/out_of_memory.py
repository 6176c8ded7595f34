"""When memory runs out: what was being done, what takes the memory, and which keys to change to which values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_train.data.loader import PackedBatch
from llava_train.errors import UserError
from llava_train.train.activations import NotImitatedError
from llava_train.train.memory import Choice, gib
from llava_train.train.remedies import find_remedy
from llava_train.train.world import World

_BELIEVED = 0.85
"""Where an estimate was too low, a remedy has to promise so much less than it."""


class RanOut(RuntimeError):
    """Memory ran out in an activity that is told in words; the cause is PyTorch's own error.

    Args:
        mend: what to change, where a step of training is not what took the memory.
    """

    def __init__(self, activity: str, mend: str | None = None) -> None:
        super().__init__(activity)
        self.mend = mend


class OutOfMemory(UserError):
    """A device's memory is too small for the stage. The message names the keys to change."""

    on_every_rank = False


@contextmanager
def noted(activity: str, *packs: PackedBatch, mend: str | None = None) -> Iterator[None]:
    """Memory that runs out inside is told with what was being done, and the greatest pack there was. Raises RanOut."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        greatest = max(packs, key=lambda pack: pack.input_ids.numel(), default=None)
        size = "" if greatest is None else f": a pack of {greatest.input_ids.numel():,} tokens, "
        size += "" if greatest is None else f"{greatest.n_images:,} images, {greatest.n_supervised:,} supervised tokens"
        raise RanOut(activity + size, mend) from error


@contextmanager
def advised(world: World, choice: Choice) -> Iterator[None]:
    """Turns memory that runs out inside into `OutOfMemory`, on the rank where it did."""
    try:
        yield
    except (RanOut, torch.OutOfMemoryError) as error:
        raise OutOfMemory(advice(error, world, choice)) from error


def advice(error: RuntimeError, world: World, choice: Choice) -> str:
    """At most eight lines."""
    config, recompute, budget = choice.config, choice.recompute, choice.budget
    doing = str(error) if isinstance(error, RanOut) else "training"
    lines = [
        f"{config.name}: the memory of rank {world.rank} ({world.device}) ran out in {doing}",
        f"PyTorch says: {_first_sentence(error.__cause__ or error)}",
    ]
    if isinstance(error, RanOut) and error.mend:
        return "\n".join([*lines, f"change: {error.mend}"])
    try:
        told = choice.estimator.estimate(config, recompute)
        remedy = find_remedy(choice.estimator, config, recompute, min(budget, int(_BELIEVED * told.total_bytes)))
    except NotImitatedError:
        return "\n".join([*lines, "change: a lower batch.max_tokens, then engine.activation_checkpointing=full"])
    kinds = ", ".join(f"{kind} {gib(n_bytes)}" for kind, n_bytes in told.by_kind().items())
    lines += [
        f"estimated for the heaviest pack ({told.pack}), activation_checkpointing {recompute}, "
        f"ZeRO {config.engine.zero}, {world.n_ranks} ranks: {gib(told.total_bytes)} of {gib(budget)}",
        f"of that: {kinds}",
        f"change: {remedy}" if remedy else "no change of keys makes it fit, by the estimate: take more or larger GPUs",
    ]
    if remedy and remedy.changes[0].startswith("batch.max_tokens"):
        lines.append("batch.max_tokens changes no result; nor do activation_checkpointing, zero and the offload keys")
    return "\n".join(lines)


def _first_sentence(error: BaseException) -> str:
    return str(error.args[0] if error.args else error).split(". ")[0].splitlines()[0]
