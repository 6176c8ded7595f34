"""`run_many`, with a loss or a gradient that is not finite in the steps that a run's `output` names.

`2-nan.5-inf` has the last rank compute a loss of nan in step 2 and of inf in step 5. "inf" is a loss of inf with a
finite gradient, "gradient" a finite loss with a gradient of inf, "weights" ruins a weight after the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from llava_train.data.loader import StepBatch
from llava_train.train import loop
from tests.train import run_many

_train_step, _forward, _train = loop.train_step, loop.forward, loop.Loop.train
faults: dict[int, str] = {}
fault: str | None = None


def planned_train(self: loop.Loop, batches: Iterable[StepBatch]) -> None:
    faults.clear()
    for word in self.config.output.split("."):
        step, _, kind = word.partition("-")
        if step.isdecimal():
            faults[int(step)] = kind
    _train(self, batches)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def faulty_forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    loss, losses = _forward(*arguments)
    if fault == "nan":
        return loss * math.nan, losses * math.nan
    if fault == "inf":
        return loss + math.inf, losses + math.inf
    return InfiniteGradient.apply(loss) if fault == "gradient" else loss, losses


def faulty_step(engine: Any, world: Any, batch: StepBatch, n_supervised: float, *watch: Any) -> Any:
    global fault
    mine = world.rank == world.n_ranks - 1
    fault = faults.get(batch.step + 1) if mine else None
    result = _train_step(engine, world, batch, n_supervised, *watch)
    if fault == "weights":
        next(p for p in engine.module.parameters() if p.requires_grad).data.view(-1)[0] = math.nan
    return result


if __name__ == "__main__":
    loop.train_step, loop.forward, loop.Loop.train = faulty_step, faulty_forward, planned_train
    run_many.main(watched=False)
