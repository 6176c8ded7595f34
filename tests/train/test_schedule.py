from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from llava_train.config import ScheduleSection
from llava_train.train.schedule import lr_factor, step_seed, unreached_steps

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, n_warmup, _: get_constant_schedule_with_warmup(optimizer, n_warmup),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(("n_steps", "warmup"), [(100, 0.03), (37, 0.5), (5, 0.0), (1, 0.03)])
def test_learning_rates_are_those_of_transformers_schedules(kind: str, n_steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = ScheduleSection(lr=kind, warmup=warmup)
    n_warmup = -(-n_steps * int(warmup * 100) // 100)
    theirs = THEIRS[kind](optimizer, n_warmup, n_steps)
    for step in range(n_steps):
        assert lr_factor(step, n_steps, schedule) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        theirs.step()


def test_seeds_differ_over_seed_step_and_rank() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


@pytest.mark.parametrize(
    ("schedule", "n_samples", "told"),
    [
        (
            {"max_steps": 40},
            170,
            "schedule.max_steps 40 is not reached: 1 epoch has 15 steps; raise schedule.epochs to 3",
        ),
        (
            {"max_steps": 40, "epochs": 2},
            170,
            "schedule.max_steps 40 is not reached: 2 epochs have 30 steps; raise schedule.epochs to 3",
        ),
        (
            {"max_steps": 40, "epochs": 0.5},
            170,
            "schedule.max_steps 40 is not reached: 0.5 epochs have 8 steps; raise schedule.epochs to 3",
        ),
        (
            {"max_steps": 5000},
            12,
            "schedule.max_steps 5,000 is not reached: 1 epoch has 1 step; raise schedule.epochs to 5,000",
        ),
        ({"max_steps": 15}, 170, None),
        ({"max_steps": 16, "epochs": 1.05}, 170, None),
        ({}, 170, None),
        ({"max_steps": 40}, 0, None),
    ],
)
def test_steps_that_the_data_do_not_have_are_told(schedule: dict[str, float], n_samples: int, told: str | None) -> None:
    section = ScheduleSection.model_validate(schedule)
    assert unreached_steps(section, n_samples, batch_size=12) == told
    if told:
        epochs = float(told.split()[-1].replace(",", ""))
        assert unreached_steps(section.model_copy(update={"epochs": epochs}), n_samples, 12) is None
