"""A run's numbers are drawn where it has them, of several runs upon each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llava_train.report.figures import Figure
from llava_train.report.histograms import histogram_figures
from llava_train.report.quantities import LEARNING, SPEED, figures, mean_loss
from llava_train.report.read import RunRecord
from llava_train.report.times import shares, shares_figure, time_spent
from tests.report.runs import HOSTILE, SINCE_THE_REPORT, evaluation, line, record


def drawn(*records: RunRecord) -> dict[str, Figure]:
    return {figure.title: figure for figure in figures((*LEARNING, *SPEED), records)}


def column(figure: Figure, name: str) -> list[str]:
    return [row[list(figure.header).index(name)] for row in figure.rows]


def test_a_figure_for_everything_that_a_run_measures(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    found = drawn(run)
    assert list(found) == [
        "Loss",
        "Loss by source",
        "Scores of answers",
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
        "Samples a second",
        "Model FLOPs utilization",
        "Peak memory",
    ]
    assert [figure.title for figure in histogram_figures([run])] == ["Tokens a sample", "How full packs were"]
    assert found["Loss"].header == ["step", "training", "held out", "single steps"]
    assert column(found["Loss"], "step") == ["0", "10", "20", "30", "40", "50", "60"]
    assert column(found["Loss"], "held out") == ["4.5", "", "", "3", "", "", "1.5"]
    assert column(found["Loss"], "training")[1:] == ["3.5", "3", "2.5", "2", "1.5", "1"], "mean over supervised tokens"
    assert column(found["Loss"], "single steps")[1] == "3.625"
    assert column(found["Loss by source"], HOSTILE)[0] == "5"
    assert column(found["Learning rate"], "language_model") == ["2e-5"] * 6
    assert found["Gradient norm"].header == ["step", "all parts", "projector", "language_model"]
    assert column(found["Model FLOPs utilization"], "MFU") == ["44.5%"] * 6
    assert column(found["Peak memory"], "GiB") == ["61"] * 6
    assert 'class="band c0"' in found["Scores of answers"].svg
    assert [key.value for key in found["Scores of answers"].legend] == ["0.8"]


def test_an_older_run_has_the_figures_that_it_has_numbers_for(tmp_path: Path) -> None:
    without = (*SINCE_THE_REPORT, "data_wait_share", "copy_share", "optimizer_share", "peak_memory_bytes", "mfu")
    lines = [{key: value for key, value in line(step).items() if key not in without} for step in (10, 20)]
    run = record(tmp_path / "run", [*lines, evaluation(20)])
    assert {"Model FLOPs utilization", "Peak memory"} & drawn(run).keys() == set()
    assert drawn(run)["Gradient norm"].header == ["step", "all parts"]
    assert histogram_figures([run]) == [] and shares_figure(run) is None
    assert [(part.name, part.seconds) for part in time_spent(run)] == [("steps", 40.0)]


def test_one_source_and_lines_of_single_steps_are_not_drawn_twice(tmp_path: Path) -> None:
    sources = {"captions": {"loss": 2.0, "n_supervised": 9}}
    run = record(tmp_path / "run", [line(step, sources=sources, loss=2.0) for step in (1, 2)])
    assert "Loss by source" not in drawn(run)
    assert drawn(run)["Loss"].header == ["step", "training"]


@pytest.mark.parametrize("value", [None, "x", {}, [1], True])
def test_a_value_of_another_type_is_a_gap(value: Any, tmp_path: Path) -> None:
    keys = [key for key in line(10) if key != "step"]
    run = record(tmp_path / "run", [line(10), {"step": 20, **dict.fromkeys(keys, value)}, line(30)])
    for title, figure in drawn(run).items():
        assert column(figure, "step") == ["10", "30"], title
    assert [row[1] for row in histogram_figures([run])[0].rows] == ["0%", "75%", "25%"]
    assert sum(part.seconds for part in time_spent(run)) == pytest.approx(2 * 20 + 2 * 6.5)


def test_the_mean_loss_of_a_line_without_sources_is_that_of_its_step() -> None:
    assert mean_loss({"loss": 3.0}) == 3.0
    assert mean_loss({"loss": None, "sources": {"a": {"loss": 1.0, "n_supervised": 0}}}) is None


def test_several_runs_are_told_apart_by_colour_and_their_curves_by_dashes(tmp_path: Path) -> None:
    first, second = record(tmp_path / "first"), record(tmp_path / "second")
    figure = drawn(first, second)["Loss"]
    assert re.findall(r'<path class="line (c\d d\d)"', figure.svg) == ["c0 d0", "c0 d1", "c1 d0", "c1 d1"]
    assert [(key.name, key.classes) for key in figure.legend] == [
        ("first", "c0 d0"),
        ("second", "c1 d0"),
        ("training", "plain d0"),
        ("held out", "plain d1"),
    ]
    assert figure.header == ["step", "first, training", "first, held out", "second, training", "second, held out"]
    [lengths, _] = histogram_figures([first, second])
    assert [key.name for key in lengths.legend] == ["first", "second"]
    assert lengths.svg.count('class="bars') == 2


def test_many_sources_of_a_run_are_told_apart_by_colour_and_dashes(tmp_path: Path) -> None:
    sources = {f"source {n}": {"loss": n, "n_supervised": 1} for n in range(30)}
    figure = drawn(record(tmp_path / "run", [line(1, sources=sources), line(2, sources=sources)]))["Loss by source"]
    assert len({key.classes for key in figure.legend}) == 30


def test_a_run_without_some_numbers_is_not_in_the_legend_of_their_figure(tmp_path: Path) -> None:
    first, second = record(tmp_path / "first", [line(1, mfu=None)]), record(tmp_path / "second")
    assert [key.name for key in drawn(first, second)["Model FLOPs utilization"].legend] == ["second"]


def test_the_table_of_many_steps_has_some_and_every_evaluation(tmp_path: Path) -> None:
    lines = [line(step, 4000) for step in range(1, 4000)]
    figure = drawn(record(tmp_path / "run", [*lines, evaluation(0), evaluation(777)]))["Loss"]
    steps = column(figure, "step")
    assert 40 <= len(steps) <= 42
    assert column(figure, "training").count("") == 2, "only an evaluation, where none ended"
    assert steps[:2] == ["0", "24"] and "777" in steps and steps[-1] == "3,999"
    assert len(figure.svg) < 30_000


def test_the_loss_of_many_steps_is_averaged_and_its_single_steps_are_not(tmp_path: Path) -> None:
    sources = [{"a": {"loss": 1.0 + step % 2, "n_supervised": 5}} for step in range(1, 1601)]
    lines = [line(step, 1600, loss=1.0 + step % 2, sources=of) for step, of in enumerate(sources, start=1)]
    figure = drawn(record(tmp_path / "run", lines))["Loss"]
    training, single = ([value for value in column(figure, name) if value] for name in ("training", "single steps"))
    assert set(training) == {"1.5"} and set(single) <= {"1", "2"}
    assert column(figure, "step")[-1] == "1,600"


def test_histograms_add_up_all_lines(tmp_path: Path) -> None:
    [lengths, packs] = histogram_figures([record(tmp_path / "run")])
    assert lengths.rows == [["20", "0%"], ["40", "75%"], ["60", "25%"]], "bins of 640 / 32 tokens; none is longer"
    assert packs.rows[-2:] == [["90%", "20%"], ["100%", "80%"]]


def test_the_shares_of_a_step_add_up_to_all_of_it() -> None:
    assert sum(shares(line(1)).values()) == pytest.approx(1)
    assert shares(line(1))["the rest"] == pytest.approx(0.05)
    assert shares({"data_wait_share": 0.7, "copy_share": 0.5})["the rest"] == 0, "rounded, or waited for beside"


def test_the_time_of_a_run_is_that_of_its_steps_evaluations_and_checkpoints(tmp_path: Path) -> None:
    spent = {part.name: part.seconds for part in time_spent(record(tmp_path / "run"))}
    assert spent == pytest.approx(
        {
            "waiting for data": 12,
            "copies to the device": 6,
            "forward": 30,
            "backward": 60,
            "gradients and optimizer": 6,
            "evaluations": 30,
            "checkpoints": 9,
            "the rest": 6,
        }
    )
    assert list(spent)[-1] == "the rest"
    assert len({part.colour for part in time_spent(record(tmp_path / "again"))}) == len(spent)
