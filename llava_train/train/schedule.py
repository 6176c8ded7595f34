"""Learning rate and random seed of a step: pure functions, so that a run's state is one integer."""

from __future__ import annotations

import math

import numpy as np

from llava_train.config import ScheduleSection


def lr_factor(step: int, n_steps: int, schedule: ScheduleSection) -> float:
    """Factor on the peak learning rate at optimizer step `step` (from 0) of `n_steps`.

    Linear warm-up, then cosine or linear to zero, or constant: the values of transformers' schedules.
    """
    n_warmup = math.ceil(n_steps * schedule.warmup)
    if step < n_warmup:
        return step / n_warmup
    if schedule.lr == "constant":
        return 1.0
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 1.0 - progress if schedule.lr == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random numbers (dropout) in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
