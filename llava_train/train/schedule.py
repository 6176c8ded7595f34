"""Learning rate and random seed of a step: pure functions, so that a run's state is one integer."""

from __future__ import annotations

import math

import numpy as np

from llava_train.config import ScheduleSection
from llava_train.data.order import n_steps_of


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


def unreached_steps(schedule: ScheduleSection, n_samples: int, batch_size: int) -> str | None:
    """Says that the data end before `schedule.max_steps`, and what to change; None where they do not.

    170 samples, 12 a step, 1 epoch, max_steps 40 -> max_steps 40 is not reached: 1 epoch has 15 steps; ...
    """
    n_steps = n_steps_of(n_samples, batch_size, schedule.epochs)
    if schedule.max_steps is None or n_steps >= schedule.max_steps or not n_samples:
        return None
    enough = math.ceil(schedule.max_steps / n_steps_of(n_samples, batch_size, 1))
    epochs, has = f"{schedule.epochs:g}", "has" if schedule.epochs == 1 else "have"
    return (
        f"schedule.max_steps {schedule.max_steps:,} is not reached: {epochs} epoch{'s' * (epochs != '1')} {has} "
        f"{n_steps:,} step{'s' * (n_steps != 1)}; raise schedule.epochs to {enough:,}"
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank's random numbers (dropout) in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
