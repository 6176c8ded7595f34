from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llava_train.train.progress import clock, fields, fitted, joined

METRICS: dict[str, Any] = {
    "loss": 1.10342,
    "lr": {"projector": 2e-5, "language_model": 1.93e-5},
    "tokens_per_s": 18432.4,
    "mfu": 0.506,
    "data_wait_share": 0.002,
    "peak_memory_bytes": 72.4 * 2**30,
}
WHOLE = "step 1250/5198  loss 1.1034  lr 2.00e-05   18,432 tokens/s  MFU 50.6%  data wait  0.2%  72.4 GiB  3:17:24 left"

texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=20)
names = ["step", "loss", "lr", "speed", "mfu", "data", "memory", "left"]
some_fields = st.fixed_dictionaries({"step": texts}, optional=dict.fromkeys(names[1:], texts))
LEAST_IMPORTANT_FIRST = ["memory", "data", "mfu", "lr", "speed", "left", "loss"]


def test_a_logged_step_is_told_with_all_that_is_known() -> None:
    assert joined(fields(METRICS, 1250, 5198, 3.0)) == WHOLE


def test_what_is_not_known_is_left_out() -> None:
    assert "mfu" not in fields({**METRICS, "mfu": None}, 1250, 5198, 3.0)
    assert "left" not in fields(METRICS, 1, 5198, None), "the first step holds what happens once"
    assert joined(fields({}, 0, 90, None)) == "step  0/90"


def test_a_terminal_of_120_columns_holds_all_and_one_of_80_the_most_important() -> None:
    shown = fields(METRICS, 1250, 5198, 3.0)
    assert fitted(shown, 120) == shown
    assert joined(fitted(shown, 80)) == "step 1250/5198  loss 1.1034  lr 2.00e-05   18,432 tokens/s  3:17:24 left"
    assert joined(fitted(shown, 30)) == "step 1250/5198  loss 1.1034"


@given(some_fields, st.integers(0, 200))
def test_a_line_fits_wherever_more_than_the_step_is_shown(shown: dict[str, str], width: int) -> None:
    kept = fitted(shown, width)
    assert "step" in kept
    assert len(joined(kept)) <= width or list(kept) == ["step"]
    assert list(kept) == [name for name in shown if name in kept], "in their order"


@given(some_fields, st.integers(0, 200))
def test_the_least_important_is_left_out_first_and_only_where_it_must(shown: dict[str, str], width: int) -> None:
    kept = fitted(shown, width)
    gone = [name for name in LEAST_IMPORTANT_FIRST if name in shown.keys() - kept.keys()]
    assert gone == [name for name in LEAST_IMPORTANT_FIRST if name in shown][: len(gone)]
    if gone:
        with_last = {name: text for name, text in shown.items() if name in kept or name == gone[-1]}
        assert len(joined(with_last)) > width


@given(st.integers(0, 10**6))
def test_the_clock_reads_back(seconds: int) -> None:
    hours, minutes, rest = map(int, clock(seconds).split(":"))
    assert 3600 * hours + 60 * minutes + rest == seconds
    assert minutes < 60 and rest < 60
