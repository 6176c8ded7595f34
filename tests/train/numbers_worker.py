"""`scripts/train.py`, with a loss or a gradient that is not finite in the steps that FAULTS names.

FAULTS is JSON: {"3": "nan"} has rank 1 (or the only one) compute a loss of nan in step 3. "inf" is a loss of inf with
a finite gradient, "gradient" a finite loss with a gradient of inf, "weights" ruins a weight after the step.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from typing import Any

import torch

from llava_train.data.loader import StepBatch
from llava_train.train import loop
from tests.train.helpers import TRAIN

FAULTS = {int(step): fault for step, fault in json.loads(os.environ["FAULTS"]).items()}
_train_step, _forward = loop.train_step, loop.forward
fault: str | None = None


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def faulty_forward(*arguments: Any) -> torch.Tensor:
    losses = _forward(*arguments)
    if fault == "nan":
        return losses * math.nan
    if fault == "inf":
        return losses + math.inf
    return InfiniteGradient.apply(losses) if fault == "gradient" else losses


def faulty_step(engine: Any, world: Any, batch: StepBatch, n_supervised: float) -> Any:
    global fault
    mine = world.rank == world.n_ranks - 1
    fault = FAULTS.get(batch.step + 1) if mine else None
    result = _train_step(engine, world, batch, n_supervised)
    if fault == "weights":
        next(p for p in engine.module.parameters() if p.requires_grad).data.view(-1)[0] = math.nan
    return result


loop.train_step, loop.forward = faulty_step, faulty_forward
sys.argv = [str(TRAIN), *sys.argv[1:]]
runpy.run_path(str(TRAIN), run_name="__main__")
