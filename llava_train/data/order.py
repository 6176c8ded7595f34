"""Which samples a step trains on: pure functions of the seed and the step.

The world size, the packing and where a run was interrupted are not among the arguments, so they cannot
change the answer, and the state of the data order is one integer.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


def n_steps_of(n_samples: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a stage. The last batch of an epoch may be smaller; a part of an epoch rounds up."""
    n_steps = math.ceil(epochs * math.ceil(n_samples / batch_size) - 1e-9)
    return n_steps if max_steps is None else min(n_steps, max_steps)


def step_samples(step: int, seed: int, n_samples: int, batch_size: int) -> np.ndarray:
    """Indices of the samples of a step (counted from 0): int64 [up to batch_size].

    Each epoch is a permutation of its own: in one epoch every sample comes exactly once.
    """
    epoch, step_in_epoch = divmod(step, math.ceil(n_samples / batch_size))
    start = step_in_epoch * batch_size
    return _permutation(seed, epoch, n_samples)[start : start + batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n_samples: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_samples)
