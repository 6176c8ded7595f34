"""The processes of an evaluation that `torchrun` started, each with a share of the questions; one without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from llava_train.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""A rank may finish its share long before another; torchrun ends all when one dies."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the evaluation."""

    rank: int = 0
    n_ranks: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
            if self.n_ranks == 1:
                raise
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
    """Joins the processes that RANK and WORLD_SIZE speak of. Each of a node takes the GPU of its LOCAL_RANK."""
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), n_ranks)
    finally:
        distributed.destroy_process_group()
