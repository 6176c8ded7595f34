"""Runs `scripts/train.py` on a machine whose last rank runs out of memory in the named activity.

python -m tests.train.out_of_memory_rank ACTIVITY --config STAGE ...
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

from llava_train.train import evaluate, loop, stage
from tests.train.helpers import TRAIN


def short_of_memory(function: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """`function`, which finds no memory on the last rank where `when` its arguments say so."""

    def run(*arguments: Any, **settings: Any) -> Any:
        is_last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])
        if is_last and when(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB")
        return function(*arguments, **settings)

    return run


if __name__ == "__main__":
    activity = sys.argv[1]
    if activity == "step 2":
        loop.train_step = short_of_memory(loop.train_step, lambda engine, world, batch, *_: batch.step == 1)
    if activity == "starting DeepSpeed":
        stage.start_engine = short_of_memory(stage.start_engine)
    if activity == "computing features":
        stage.cached_features = short_of_memory(stage.cached_features)
    if activity == "evaluating":
        evaluate.forward = short_of_memory(evaluate.forward)
    sys.argv = [str(TRAIN), *sys.argv[2:]]
    runpy.run_path(str(TRAIN), run_name="__main__")
