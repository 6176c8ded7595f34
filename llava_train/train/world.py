"""The processes of a run: who this one is, how they start, and how they agree on things that no GPU needs to know.

Beside the group of DeepSpeed, which moves tensors between devices, the processes have a *control group* on gloo: the
stop flag, the number of supervised tokens and the state of a checkpoint go over it without a wait for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
from torch import distributed

from llava_train.devices import keep_freed_memory
from llava_train.errors import UserError
from llava_train.launch import launch_environment
from llava_train.train.watchdog import Watchdog

T = TypeVar("T")

_MANY, _LEAST_TIMEOUT_S = 10, 1800.0
"""Time-outs of the watchdog, and at least so many seconds, that a collective may take: rank 0 may work alone."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    n_ranks: int
    device: torch.device
    control: distributed.ProcessGroup | None = None
    """Process group on CPUs; None before there is one, or alone."""
    watchdog: Watchdog | None = None
    """Ends the job when a rank hangs; None before it is there."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank. Every rank must call it, with something that can be pickled."""
        if self.n_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.n_ranks
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, on every rank. Every rank must call it.

        Raises:
            UserError, RuntimeError: on every rank, what `decide` raised on rank 0. An OSError becomes a UserError.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer = [decide(), None]
            except OSError as error:
                answer = [None, UserError(f"{error.filename or 'a file'}: {error.strerror or error}")]
            except Exception as error:
                if self.n_ranks == 1:
                    raise
                told = error if isinstance(error, UserError) else RuntimeError(f"rank 0 failed: {error!r}")
                distributed.broadcast_object_list([None, told], src=0, group=self.control)
                raise
        if self.n_ranks > 1:
            distributed.broadcast_object_list(answer, src=0, group=self.control)
        value, raised = answer
        if raised is not None:
            raise raised
        return value

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over the ranks. Every rank must call it. No device is waited for."""
        if self.n_ranks == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums, group=self.control)
        return sums.tolist()

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.sum(0.0)

    def beat(self, activity: str, patience: float = 1.0) -> None:
        """Tells the watchdog what begins now, on every rank alike, and how many time-outs it may stand still."""
        if self.watchdog:
            self.watchdog.beat(activity, patience)

    def touch(self) -> None:
        """Tells the watchdog that this rank goes on in what it does."""
        if self.watchdog:
            self.watchdog.touch()

    def say(self, text: str) -> None:
        """Prints a line on rank 0."""
        if self.is_main:
            print(text, flush=True)


def start_distributed(timeout_s: float = 600.0) -> World:
    """Joins the processes that `deepspeed`, `torchrun` or `srun` started; alone under plain `python`.

    Args:
        timeout_s: of the watchdog, which knows who hangs; collectives give up much later, and know nothing.

    Raises:
        LaunchError: the environment does not say which of the processes this is.
    """
    for name, value in launch_environment(os.environ).items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    # On CPUs DeepSpeed would compile a collective of its own. That takes a compiler, and a build that was killed
    # leaves a lock on which every later run waits for ever. Gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    interface = os.environ.get("NCCL_SOCKET_IFNAME", "^")
    if interface[0] not in "^=" and "," not in interface:  # what NCCL is told of the network holds for gloo too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=max(_MANY * timeout_s, _LEAST_TIMEOUT_S))
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    n_ranks = distributed.get_world_size()
    control = distributed.new_group(backend="gloo", timeout=timeout) if n_ranks > 1 else None
    return World(distributed.get_rank(), n_ranks, device, control)


@contextmanager
def guarded(world: World, timeout_s: float) -> Iterator[World]:
    """The world with a watchdog that ends the job when no rank has gone on for `timeout_s`."""

    def share_port(port: int | None) -> int:
        found: list[Any] = [port]
        distributed.broadcast_object_list(found, src=0, group=world.control)
        return int(found[0])

    host = os.environ["MASTER_ADDR"]
    with Watchdog(world.rank, world.n_ranks, host, share_port, timeout_s) as watchdog:
        yield replace(world, watchdog=watchdog)
