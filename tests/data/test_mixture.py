"""A mixture is the same samples for everyone, as often as each source's `take` says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.config import SourceSection, Take
from llava_train.data.mixture import open_mixture, taken
from llava_train.data.order import step_samples
from llava_train.data.problems import DataError

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
TAKES = (
    st.just(Take())
    | st.builds(Take, first=st.integers(1, 50))
    | st.builds(Take, fraction=st.floats(0.01, 1))
    | st.builds(Take, repeat=st.integers(1, 4))
)


def sections(folder: Path, takes: dict[str, object]) -> list[SourceSection]:
    found = []
    for name, take in takes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps([{"id": f"{name}{i}", "conversations": TURNS} for i in range(len(name) * 2)]))
        found.append(SourceSection(path=str(path), take=take))
    return found


@given(n_samples=st.integers(1, 60), take=TAKES, seed=st.integers(0, 5))
def test_a_take_has_the_stated_number_of_samples_each_equally_often(n_samples: int, take: Take, seed: int) -> None:
    indices = taken(n_samples, take, seed)
    counts = Counter(indices.tolist())
    wanted = min(take.first or n_samples, n_samples)
    if take.fraction:
        wanted = max(1, round(take.fraction * n_samples))
    assert len(counts) == wanted
    assert set(counts.values()) == {take.repeat}
    assert min(counts) >= 0 and max(counts) < n_samples
    assert np.array_equal(indices, taken(n_samples, take, seed))
    if take.first:
        assert sorted(counts) == list(range(wanted))


def test_shares_of_another_seed_are_others() -> None:
    shares = [taken(1000, Take(fraction=0.1), seed).tolist() for seed in range(2)]
    assert shares[0] != shares[1]
    assert len(set(shares[0]) & set(shares[1])) < 40


def test_sources_are_counted_end_to_end_as_often_as_they_are_taken(tmp_path: Path) -> None:
    mixture = open_mixture(sections(tmp_path, {"a": "all", "bb": "first 3", "ccc": "repeat 2", "dddd": 0.5}))
    ids = [mixture[i].id for i in range(len(mixture))]
    assert ids[:5] == ["a0", "a1", "bb0", "bb1", "bb2"]
    assert ids[5:17] == [f"ccc{i}" for i in range(6)] * 2
    assert len(ids) == 2 + 3 + 12 + 4
    place = mixture.locate(6)
    assert (place.source.name, place.source_number, place.index) == ("ccc", 2, 1)
    for index in (-1, len(mixture)):
        with pytest.raises(IndexError):
            mixture.locate(index)


def test_an_epoch_has_every_taken_sample_as_often_as_stated_and_another_order(tmp_path: Path) -> None:
    mixture = open_mixture(sections(tmp_path, {"a": "all", "ccc": "repeat 3"}))
    epochs = []
    for first in (0, 4):
        steps = [step_samples(step, 1, len(mixture), 5) for step in range(first, first + 4)]
        epochs.append([mixture[int(i)].id for i in np.concatenate(steps)])
    assert Counter(epochs[0]) == Counter(epochs[1]) == {"a0": 1, "a1": 1, **{f"ccc{i}": 3 for i in range(6)}}
    assert epochs[0] != epochs[1]


def test_more_than_there_is_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.json: take first 3, but it holds 2 samples"):
        open_mixture(sections(tmp_path, {"a": "first 3"}))


def test_sources_of_one_name_get_numbers_and_given_names_stay_apart(tmp_path: Path) -> None:
    [section] = sections(tmp_path, {"a": "all"})
    mixture = open_mixture([section, section, section])
    assert [source.name for source in mixture.sources] == ["a", "a-2", "a-3"]
    named = section.model_copy(update={"name": "a"})
    with pytest.raises(DataError, match="two sources are named 'a'"):
        open_mixture([section, named])
