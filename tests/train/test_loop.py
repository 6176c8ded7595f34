from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_train.data.loader import StepBatch
from llava_train.train import loop, window
from llava_train.train.grad_norm import GradNorm
from llava_train.train.session import Session
from llava_train.train.window import Window
from llava_train.train.world import World
from tests.tiny import stage
from tests.train.helpers import Clock


@pytest.mark.parametrize("log_every", [1, 2])
def test_evaluation_and_checkpoints_are_not_counted_as_training_time(
    log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for module in (loop, window):
        monkeypatch.setattr(module, "time", clock)

    def train_step(*_: Any) -> tuple[torch.Tensor, GradNorm, bool]:
        clock.sleep(1.0)
        return torch.ones(1, 2, dtype=torch.float64), GradNorm(1.0), True

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(StepBatch, "n_supervised", 1)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), skipped_steps=0)
    batches = [StepBatch(step, (), (1,), ()) for step in range(4)]
    config = stage(Path("x"), logging={"every": log_every}, checkpoint={"every": 1})
    tracker, checkpoints = Mock(), Mock(save=lambda step, window: clock.sleep(30.0))
    session = Session(World(0, 1, torch.device("cpu")))
    of_start = Window(("x",), started=clock.now_s)
    steps = loop.Loop(session, config, engine, 4, tracker, of_start, checkpoints, lambda step: clock.sleep(20.0))
    steps.train(batches)
    logged = [call.args[1] for call in tracker.step.call_args_list if len(call.args) == 2]
    assert len(logged) == {1: 4, 2: 3}[log_every]
    assert [metrics["step_s"] for metrics in logged] == [1.0] * len(logged)
    n_before = {1: [0, 1, 1, 1], 2: [0, 1, 2]}[log_every]
    for name, each_s in (("evaluation_s", 20.0), ("checkpoint_s", 30.0)):
        assert [metrics[name] for metrics in logged] == [each_s * n for n in n_before], name


def trained(
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    saves: bool = True,
    stop_before: int | None = None,
) -> tuple[loop.Loop, list[int]]:
    """A loop that saves every 2 steps, whose steps are taken or not, and the steps that it saved."""
    answers = iter(taken)
    monkeypatch.setattr(
        loop, "train_step", lambda *_: (torch.ones(1, 2, dtype=torch.float64), GradNorm(1.0), next(answers))
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(StepBatch, "n_supervised", 1)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), skipped_steps=0)
    checkpoints, saved = Mock(saved_step=None), []

    def save(step: int, window: Any) -> None:
        saved.append(step)
        checkpoints.saved_step = step if saves else None

    checkpoints.save = save
    config = stage(Path("x"), checkpoint={"every": 2}, output=str(tmp_path))
    session = Session(World(0, 1, torch.device("cpu")))
    steps = loop.Loop(session, config, engine, 6, Mock(), Window(("x",)), checkpoints, lambda step: None)

    def batches() -> Iterator[StepBatch]:
        for step in range(len(taken)):
            if step == stop_before:
                session.stop.stop_files.append(tmp_path)  # exists
            yield StepBatch(step, (), (1,), ())

    monkeypatch.setattr("llava_train.train.interrupt._LOOK_EVERY_S", 0.0)
    with suppress(loop.Preempted):
        steps.train(batches())
    return steps, saved


def test_a_checkpoint_that_falls_on_a_bad_step_follows_the_next_good_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert trained([True, False, False, True, True, True], monkeypatch, tmp_path)[1] == [4, 6]


def test_a_run_that_is_stopped_after_a_bad_step_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert trained([True, True, False, True], monkeypatch, tmp_path, stop_before=3)[1] == [2, 3]


def test_a_run_that_cannot_save_when_asked_to_stop_does_not_ask_to_be_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        loop.NotSavedError, match=r"stopped after step 1 of 6; the same command goes on from the beginni"
    ):
        trained([True, True], monkeypatch, tmp_path, saves=False, stop_before=1)


@given(n_bad=st.integers(0, 300), step=st.integers(1, 50), n_more=st.integers(0, 50), share=st.floats(0, 1))
def test_too_many_are_a_share_of_all_so_far_or_of_the_first_thousand(n_bad, step, n_more, share) -> None:
    config = stage(Path("x"), max_bad_share=share, batch={"size": 40, "max_tokens": 2048, "max_sample_tokens": 1024})
    n_seen, n_all = 40 * step, 40 * (step + n_more)
    of = n_seen if n_seen >= 1000 else min(n_all, 1000)
    assert loop.too_many_bad(n_bad, step, step + n_more, config) == (n_bad > share * of)
