"""The processes of a run: who this one is, how they start, and how they agree on things that no GPU needs to know.

Beside the group of DeepSpeed, which moves tensors between devices, the processes have a *control group* on gloo: the
stop flag, the number of supervised tokens and the state of a checkpoint go over it without a wait for the device.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
from torch import distributed

from llava_train.devices import keep_freed_memory, training_device
from llava_train.errors import OtherRankFailed, UserError
from llava_train.failures import file_trouble
from llava_train.launch import check_gpus, launch_environment, note_on_launch, set_for_libraries
from llava_train.onednn import limit_kernels
from llava_train.train.watchdog import Watchdog

T = TypeVar("T")

_UNUSUAL_S = 60.0
"""A start that takes longer lacks a process, or a way to it."""
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

    @property
    def activity(self) -> str:
        """What the watchdog was told last; empty before it is there."""
        return self.watchdog.activity if self.watchdog else ""

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
            UserError: on every rank, what `decide` raised on rank 0. An OSError becomes one.
            OtherRankFailed: on all but rank 0, where it raised something else.
        """
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer = [decide(), None]
            except OSError as error:
                answer = [None, UserError(file_trouble(error))]
                answer[1].keeps_traceback, answer[1].__cause__ = True, error
            except Exception as error:
                if self.n_ranks > 1:
                    told = error if isinstance(error, UserError) else OtherRankFailed("rank 0 failed")
                    distributed.broadcast_object_list([None, told], src=0, group=self.control)
                raise
        if self.n_ranks > 1:
            distributed.broadcast_object_list(answer, src=0, group=self.control)
        value, raised = answer
        if raised is not None:
            raised.told_by_main = not self.is_main
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
        LaunchError: the environment does not say which of the processes this is, or a process has no GPU.
        UserError: there is a GPU, and torch cannot use it.
    """
    atexit.unregister(_destroy_groups)
    set_for_libraries(os.environ)
    found = launch_environment(os.environ)
    device = training_device()
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    check_gpus({**os.environ, **found}, n_gpus)
    if note := note_on_launch(os.environ, found, n_gpus):
        print(note, flush=True)
    for name, value in found.items():
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        limit_kernels()
        # On CPUs DeepSpeed would compile a collective of its own. That takes a compiler, and a build that was killed
        # leaves a lock on which every later run waits for ever. Gloo does the work. The whole table is set: DeepSpeed
        # fills it when it is first read, for which it runs a compiler and asks the GPUs about each of its operators.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    interface = os.environ.get("NCCL_SOCKET_IFNAME", "^")
    if interface[0] not in "^=" and "," not in interface:  # what NCCL is told of the network holds for gloo too
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    timeout = timedelta(seconds=max(_MANY * timeout_s, _LEAST_TIMEOUT_S))
    if not distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        place = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        waiting = f"rank {os.environ['RANK']} still waits for the other processes of the run, at {place}"
        with said_after(_UNUSUAL_S if os.environ["LOCAL_RANK"] == "0" else None, waiting):
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    n_ranks = distributed.get_world_size()
    control = distributed.new_group(backend="gloo", timeout=timeout) if n_ranks > 1 else None
    return World(distributed.get_rank(), n_ranks, device, control)


@contextmanager
def said_after(wait_s: float | None, text: str) -> Iterator[None]:
    """Prints a line when what happens inside takes longer; never for None."""
    timer = threading.Timer(wait_s or 0, print, (text,), {"flush": True})
    timer.daemon = True
    if wait_s is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def guarded(world: World, timeout_s: float) -> Iterator[World]:
    """The world with a watchdog that ends the job when no rank has gone on for `timeout_s`.

    After a clean end, the process groups are destroyed when the process ends: NCCL warns of groups that are left. Not
    earlier, for a later run in this process uses them; and not after a failure, for destroying a group may wait for
    ranks that hang in a collective.
    """

    def share_port(port: int | None) -> int:
        found: list[Any] = [port]
        distributed.broadcast_object_list(found, src=0, group=world.control)
        return int(found[0])

    host = os.environ["MASTER_ADDR"]
    with Watchdog(world.rank, world.n_ranks, host, share_port, timeout_s) as watchdog:
        yield replace(world, watchdog=watchdog)
    atexit.register(_destroy_groups)


def _destroy_groups() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
