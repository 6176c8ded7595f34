from __future__ import annotations

from pathlib import Path

import pytest

from llava_train.train.metrics import Yardstick, model_flops
from llava_train.train.pace import ASSUMED_MFU, Pace, about, expected_step_s, figure
from tests.tiny import dataset_of, tiny_llava, write_data


def test_the_expected_time_of_a_step_is_its_flops_over_a_share_of_the_peak(tmp_path: Path) -> None:
    llava = tiny_llava()
    dataset = dataset_of(llava, write_data(tmp_path, n_samples=12), n_ranks=2)
    flops = model_flops(llava.model, llava.n_image_tokens)
    yardstick = Yardstick(flops, 1e12, llava.n_image_tokens, llava.model.config.image_token_id)
    of_epoch = sum(
        yardstick.measure(pack).flops
        for rank in range(2)
        for step in range(2)
        for pack in dataset_of(llava, tmp_path / "data-0.json", n_ranks=2, rank=rank)[step].micro_batches
    )
    n_steps, n_ranks = 2, 2
    assert expected_step_s(dataset, yardstick) == pytest.approx(of_epoch / n_steps / n_ranks / (1e12 * ASSUMED_MFU))


@pytest.mark.parametrize("unknown", [{"flops": None, "peak_flops": 1e12}, {"flops": object(), "peak_flops": None}])
def test_nothing_is_expected_where_flops_or_peak_are_not_known(unknown: dict[str, object], tmp_path: Path) -> None:
    dataset = dataset_of(tiny_llava(), write_data(tmp_path))
    assert expected_step_s(dataset, Yardstick(**unknown)) is None  # type: ignore[arg-type]


def test_a_pace_is_measured_without_the_first_line_and_told_once() -> None:
    pace, told = Pace(), []
    for step in (1, 3, 6, 9, 12):
        told.append(pace.measured(step, {"step_s": 2.0, "time_left_s": 2.0 * (90 - step)}))
        assert pace.step_s == (None if step == 1 else 2.0)
    assert told == [None, None, "measured over 5 steps: the rest takes about 3 min", None, None]


def test_what_is_told_is_the_mean_of_all_measured_steps() -> None:
    pace, told = Pace(), []
    for step, step_s in ((1, 30.0), (2, 1.0), (4, 1.0), (6, 3.5)):
        told.append(pace.measured(step, {"step_s": step_s, "time_left_s": step_s * (36 - step)}))
    assert told == [None, None, None, "measured over 5 steps: the rest takes about 60 s"]


def test_nothing_is_told_when_nothing_is_left() -> None:
    pace = Pace()
    assert [pace.measured(step, {"step_s": 2.0, "time_left_s": 2.0 * (9 - step)}) for step in (1, 9)] == [None, None]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "a second"), (40, "40 s"), (720, "12 min"), (5399, "90 min"), (34200, "9.5 h"), (276480, "3.2 days")],
)
def test_a_time_is_told_as_people_would(seconds: float, words: str) -> None:
    assert about(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2250.0, "2,250"),
        (989.4, "989"),
        (66.9, "66.9"),
        (40.0, "40"),
        (7.0, "7"),
        (0.1, "0.1"),
        (0.0012345, "0.00123"),
        (100.0, "100"),
        (0.0, "0"),
    ],
)
def test_a_figure_has_three_digits_whatever_its_size(value: float, words: str) -> None:
    assert figure(value) == words
