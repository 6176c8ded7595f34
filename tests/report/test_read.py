"""A run's folder is read as far as it can be, and what cannot be read is told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.report.read import ReportError, number, read_run
from tests.report.runs import evaluation, line, record, write_run

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(JSON | st.just(10**400))
def test_a_number_is_finite_or_none(value: object) -> None:
    found = number(value)
    assert found is None or (type(found) is float and math.isfinite(found) and found == value)
    assert number(3) == 3.0 and number(True) is None and number("3") is None


def test_lines_of_steps_and_of_evaluations_are_told_apart_and_in_order(tmp_path: Path) -> None:
    read = record(tmp_path / "run", [line(20), evaluation(20), line(10), evaluation(0)])
    assert [each["step"] for each in read.training] == [10, 20]
    assert [each["step"] for each in read.evaluations] == [0, 20]
    assert (read.step, read.n_steps, read.complete, read.notes) == (20, 60, False, ())
    assert read.about["n_ranks"] == 2 and "about" not in read.config


def test_lines_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    good = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(f'{good}5\n{{"step": "x"}}\n\n{{"loss": 1}}\n{{"step": 70, "lo')
    read = read_run(folder)
    assert len(read.training) == 6 and read.step == 60
    assert read.notes == ("4 of 13 lines of metrics.jsonl cannot be read, and are left out.",)


@pytest.mark.parametrize("text", [None, "a: [", "- a list", "\x00"])
def test_a_run_is_read_without_its_config(text: str | None, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    if text is not None:
        (folder / "config.yaml").write_text(text)
    read = read_run(folder)
    assert (read.name, read.config, read.step) == ("run", {}, 60)
    assert read.notes == ("config.yaml is missing or cannot be read.",)


def test_a_result_without_a_whole_manifest_is_not_complete(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", complete=True)
    assert read_run(folder).complete
    (folder / "model/COMPLETE").write_text("{")
    assert not read_run(folder).complete


def test_what_is_no_run_or_has_logged_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run folder, for it has neither metrics.jsonl nor config.yaml"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="has no line yet"):
        read_run(write_run(tmp_path / "new", []))
