"""The processes of an evaluation that torchrun or srun started, each with a share of the questions; one without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from llava_train.errors import UserError
from llava_train.launch import check_gpus, launch_environment, set_for_libraries

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""A rank may finish its share long before another; torchrun ends all when one dies."""
_FAILED = "evaluation_failed"
"""Key of the store, once a rank failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the evaluation."""

    rank: int = 0
    n_ranks: int = 1
    store: distributed.Store | None = None
    """What all ranks can read and write at any time; None alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_failed(self) -> bool:
        """Whether a rank failed in `on_all`: what this one still does there is for nothing."""
        return self.store is not None and self.store.check([_FAILED])

    def on_all(self, do: Callable[[], T]) -> T:
        """What `do` returns on this rank, once it succeeded on every rank. Every rank must call it.

        Raises:
            UserError: on rank 0, what it raised on any rank. The others end with exit code 2, saying nothing.
        """
        done: list[T] = []
        failures: list[str] = []
        try:
            done.append(do())
        except (UserError, OSError) as error:
            if self.store is None:
                raise
            self.store.set(_FAILED, "")
            failures.append(str(error))
        if failures := self.gather(failures):
            raise UserError(failures[0]) if self.is_main else SystemExit(2)
        return done[0]

    def on_main(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, on every rank. Every rank must call it. Raises as `on_all`."""
        told: list[Any] = [self.on_all(lambda: decide() if self.is_main else None)]
        if self.n_ranks > 1:
            distributed.broadcast_object_list(told, src=0)
        return told[0]

    def gather(self, values: Sequence[T]) -> list[T]:
        """The values of all ranks, on every rank. Every rank must call it."""
        found: list[Any] = [values]
        if self.n_ranks > 1:
            found = [None] * self.n_ranks
            distributed.all_gather_object(found, values)
        return [value for share in found for value in share]


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun or srun started. Each of a node takes the GPU of its LOCAL_RANK.

    Raises:
        LaunchError: a process without a GPU beside some that have one, or one that no launcher placed as it should.
    """
    set_for_libraries(os.environ)
    found = launch_environment(os.environ)
    if int({**os.environ, **found}.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    for name, value in found.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        check_gpus(os.environ, torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, n_ranks = next(rendezvous("env://", timeout=_PATIENCE))
    store.set_timeout(_PATIENCE)
    distributed.init_process_group("gloo", timeout=_PATIENCE, store=store, rank=rank, world_size=n_ranks)
    try:
        yield Ranks(rank, n_ranks, store)
    finally:
        distributed.destroy_process_group()
