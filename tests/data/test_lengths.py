from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llava_train.data import lengths
from llava_train.data.lengths import Longest, SampleLengths, longest_of, measure, measure_longest, samples_of_run
from llava_train.data.mixture import Mixture
from llava_train.data.order import n_steps_of, step_samples
from llava_train.data.sources import open_source
from tests.tiny import encoder_of, stage, tiny_llava, write_data


def test_lengths_are_those_of_the_encoded_samples_and_0_of_bad_ones(tmp_path: Path) -> None:
    path = write_data(tmp_path, 6)
    rows = json.loads(path.read_text())
    rows[2]["conversations"].reverse()
    path.write_text(json.dumps(rows))
    encoder, mixture = encoder_of(tiny_llava()), Mixture([open_source(path)])
    found = measure(mixture, encoder, range(6))
    good = [number for number in range(6) if number != 2]
    encoded = [encoder.encode(mixture[number]) for number in good]
    assert found.n_tokens[good].tolist() == [one.n_tokens for one in encoded]
    assert found.n_images[good].tolist() == [one.n_images for one in encoded]
    assert found.n_tokens[2] == found.n_supervised[2] == found.n_images[2] == 0


def test_the_longest_are_at_most_a_step_of_samples_and_none_that_is_bad() -> None:
    n_tokens = np.array([5, 0, 9, 7, 9])
    of_five = SampleLengths(n_tokens, n_tokens, np.array([1, 0, 0, 3, 0]))
    assert longest_of(of_five, 3) == Longest((9, 9, 7), (3, 1, 0))
    assert longest_of(of_five, 12) == Longest((9, 9, 7, 5), (3, 1, 0, 0))
    assert longest_of(SampleLengths(n_tokens * 0, n_tokens, n_tokens), 3) is None


@pytest.mark.parametrize(
    "schedule", [{"max_steps": 3}, {"epochs": 0.3}, {"epochs": 2}, {"epochs": 1.5, "max_steps": 9}]
)
def test_the_samples_of_a_run_are_those_of_its_steps(schedule: dict[str, float]) -> None:
    config = stage(Path("x"), batch={"size": 4, "max_tokens": 2048}, schedule=schedule, seed=3)
    n_steps = n_steps_of(30, 4, config.schedule.epochs, config.schedule.max_steps)
    of_steps = {number for step in range(n_steps) for number in step_samples(step, 3, 30, 4).tolist()}
    assert samples_of_run(config, 30).tolist() == sorted(of_steps)


def test_of_more_samples_than_are_measured_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_data(tmp_path, 6)
    encoder, mixture = encoder_of(tiny_llava()), Mixture([open_source(path)])
    batch = {"size": 4, "max_tokens": 2048}
    assert measure_longest(stage(path, batch=batch), mixture, encoder) is not None
    monkeypatch.setattr(lengths, "MOST_MEASURED", 5)
    assert measure_longest(stage(path, batch=batch), mixture, encoder) is None
    assert measure_longest(stage(path, batch=batch, schedule={"max_steps": 1}), mixture, encoder) is not None
