"""Runs `scripts/train.py` with a fault on its last rank.

python -m tests.train.failure_rank FAULT --config STAGE ...
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch

from llava_train.data.loader import StepDataset
from llava_train.train import loop, stage
from tests.train.helpers import TRAIN

IN_STEP: dict[str, Callable[[], Any]] = {
    "a bug": lambda: {}["optimizer"],
    "no host memory": lambda: torch.empty(10**15),
    "its end": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
IN_WORKER: dict[str, Callable[[], Any]] = {
    "a worker's bug": lambda: {}["sample"],
    "a worker's end": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def in_step(fault: Callable[[], Any]) -> None:
    train_step = loop.train_step

    def failing(engine: Any, world: Any, batch: Any, *others: Any) -> Any:
        if batch.step == 1 and world.rank == world.n_ranks - 1:
            fault()
        return train_step(engine, world, batch, *others)

    loop.train_step = failing


def in_worker(fault: Callable[[], Any]) -> None:
    read = StepDataset.__getitem__

    def failing(self: StepDataset, step: int) -> Any:
        if step == 1:
            fault()
        return read(self, step)

    StepDataset.__getitem__ = failing


def no_room_for_result() -> None:
    """No file of the result may become large: EFBIG, as of a quota."""
    write_result = stage.write_result

    def failing(*arguments: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        write_result(*arguments)

    stage.write_result = failing


def take_port() -> socket.socket:
    """Where two ranks would meet, somebody listens."""
    listener = socket.create_server(("", 0))
    os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(listener.getsockname()[1])}
    return listener


if __name__ == "__main__":
    fault = sys.argv[1]
    if fault in IN_STEP:
        in_step(IN_STEP[fault])
    if fault in IN_WORKER:
        in_worker(IN_WORKER[fault])
    if fault == "no room for the result":
        no_room_for_result()
    taken = take_port() if fault == "a taken port" else None
    sys.argv = [str(TRAIN), *sys.argv[2:]]
    runpy.run_path(str(TRAIN), run_name="__main__")
