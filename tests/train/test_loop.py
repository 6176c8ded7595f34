from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_train.data.loader import StepBatch
from llava_train.train import loop
from llava_train.train.session import Session
from llava_train.train.window import Window
from llava_train.train.world import World
from tests.tiny import stage


@pytest.mark.parametrize("log_every", [1, 2])
def test_evaluation_and_checkpoints_are_not_counted_as_training_time(
    log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: (torch.ones(1, 2, dtype=torch.float64), 1.0, True))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), skipped_steps=0)
    batches = [StepBatch(step, (), (1,), ()) for step in range(4)]
    config = stage(Path("x"), logging={"every": log_every}, checkpoint={"every": 1})
    tracker, checkpoints = Mock(), Mock(save=lambda step, window: time.sleep(0.3))
    session = Session(World(0, 1, torch.device("cpu")))
    steps = loop.Loop(session, config, engine, 4, tracker, Window(("x",)), checkpoints, lambda step: time.sleep(0.3))
    steps.train(batches)
    logged = [call.args[1] for call in tracker.step.call_args_list if len(call.args) == 2]
    assert len(logged) == {1: 4, 2: 3}[log_every]
    assert all(metrics["step_s"] < 0.1 for metrics in logged)


@given(n_bad=st.integers(0, 300), step=st.integers(1, 50), n_more=st.integers(0, 50), share=st.floats(0, 1))
def test_too_many_are_a_share_of_all_so_far_or_of_the_first_thousand(n_bad, step, n_more, share) -> None:
    config = stage(Path("x"), max_bad_share=share, batch={"size": 40, "max_tokens": 2048, "max_sample_tokens": 1024})
    n_seen, n_all = 40 * step, 40 * (step + n_more)
    of = n_seen if n_seen >= 1000 else min(n_all, 1000)
    assert loop.too_many_bad(n_bad, step, step + n_more, config) == (n_bad > share * of)
