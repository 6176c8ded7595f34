from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.data.order import n_steps_of, step_samples


@given(
    n_samples=st.integers(1, 300), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31), epoch=st.integers(0, 3)
)
def test_every_sample_comes_exactly_once_an_epoch(n_samples, batch_size, seed, epoch) -> None:
    n_steps = math.ceil(n_samples / batch_size)
    steps = range(epoch * n_steps, (epoch + 1) * n_steps)
    seen = [i for step in steps for i in step_samples(step, seed, n_samples, batch_size).tolist()]
    assert sorted(seen) == list(range(n_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (step_samples(step, 0, 100, 100).tolist() for step in (0, 1))
    assert first != second
    assert step_samples(0, 1, 100, 100).tolist() != first


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    expected = step_samples(7, 3, 50, 8).tolist()
    for step in (0, 20, 3):
        step_samples(step, 3, 50, 8)
    assert step_samples(7, 3, 50, 8).tolist() == expected


@pytest.mark.parametrize(
    ("n_samples", "batch_size", "epochs", "max_steps", "n_steps"),
    [
        (558128, 256, 1, None, 2181),
        (665298, 128, 1, None, 5198),
        (10, 4, 3, None, 9),
        (10, 4, 0.5, None, 2),
        (10, 4, 3, 5, 5),
    ],
)
def test_numbers_of_steps_are_the_published_ones(n_samples, batch_size, epochs, max_steps, n_steps) -> None:
    assert n_steps_of(n_samples, batch_size, epochs, max_steps) == n_steps
