"""Runs `scripts/train.py` on a machine whose rank 1 runs out of memory in its second step.

python -m tests.train.out_of_memory_rank --config STAGE ...
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch

from llava_train.train import loop
from tests.train.helpers import TRAIN

_train_step = loop.train_step


def short_of_memory(engine: Any, world: Any, batch: Any, *others: Any) -> Any:
    if batch.step == 1 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB")
    return _train_step(engine, world, batch, *others)


if __name__ == "__main__":
    loop.train_step = short_of_memory
    sys.argv = [str(TRAIN), *sys.argv[1:]]
    runpy.run_path(str(TRAIN), run_name="__main__")
