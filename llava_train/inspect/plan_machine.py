"""The machine that a plan is for: one that is described, or this one."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import psutil
import torch

from llava_train.config import StageConfig
from llava_train.devices import training_device
from llava_train.inspect.plan import CPU, Speed, bytes_of
from llava_train.inspect.plan_lengths import PlanError


@dataclass(frozen=True)
class Machine:
    """What a plan has to know of it."""

    memory: int
    """Bytes of each GPU, or of each process on CPUs."""
    device: str
    """As in `plan.make_plan`."""
    speed: Speed | None
    """Where it was measured."""


def machine_of(
    config: StageConfig, n_ranks: int, memory: str | None, device: str | None, tflops: float | None, measure: bool
) -> Machine:
    """The machine that the options of `llava-train plan` mean; None stands for an option that was not given.

    Raises UserError.
    """
    if measure and (device or tflops is not None):
        raise PlanError("--measure finds out how fast this machine is: leave --device and --tflops out")
    n_bytes = bytes_of(memory) if memory else None
    if not measure:
        device = device or "H100"
        if n_bytes is None:
            n_bytes = _memory_of(torch.device("cpu"), n_ranks) if device.upper() == CPU else bytes_of("80G")
        return Machine(n_bytes, device, None)
    here = training_device()
    n_bytes = n_bytes or _memory_of(here, n_ranks)  # before the steps take a part of it
    print("plan: training a few steps on this machine", file=sys.stderr, flush=True)
    with redirect_stdout(sys.stderr):  # what libraries say is no part of a plan
        from llava_train.inspect.plan_measure import measure_speed  # loads DeepSpeed, for seconds

        speed = measure_speed(config, n_ranks)
    return Machine(n_bytes, CPU if here.type == "cpu" else torch.cuda.get_device_name(here), speed)


def _memory_of(device: torch.device, n_ranks: int) -> int:
    """Bytes of a GPU of this machine, or of the RAM that is free, for each process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().available // n_ranks
