"""A rank that stops answering ends the run, which names it; the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from llava_train.train.watchdog import EXIT_HUNG
from tests.train.helpers import TRAIN, Outcome, ended, run_many, start_ranks, write_samples, write_stage
from tests.train.test_preemption import is_midway, wait_until
from tests.train.test_resume import FULL, assert_same_run, command

N_STEPS, TIMEOUT_S = 50, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    write_samples(folder / "data.json", "itimtittiitmi")
    write_stage(
        folder / "run.yaml",
        engine={"zero": 2, "precision": "fp32", "hang_timeout_s": TIMEOUT_S},
        trainable=FULL,
        schedule={"max_steps": N_STEPS, "epochs": 99},
        checkpoint={"every": 2, "keep": 2},
    )
    return folder


@pytest.fixture(scope="module")
def hung(folder: Path) -> tuple[int | None, int, float, str]:
    """Exit code of rank 0, process of rank 1, seconds until rank 0 ended, and its words, when rank 1 is frozen."""
    ranks = start_ranks([TRAIN, *command(folder, "run", "hung")], folder, n_ranks=2)
    wait_until(is_midway(folder, "hung"), lambda: all(rank.exitcode is None for rank in ranks))
    os.kill(ranks[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    ranks[0].join(60)
    took_s = time.monotonic() - started
    return ranks[0].exitcode, ranks[1].pid, took_s, ended(ranks, folder).stderr[0]


def test_a_frozen_rank_ends_the_run_in_time(hung: tuple[int | None, int, float, str]) -> None:
    code, _, took_s, _ = hung
    assert code == EXIT_HUNG
    assert took_s < 8 * TIMEOUT_S


def test_the_message_names_the_rank_and_what_the_others_wait_in(hung: tuple[int | None, int, float, str]) -> None:
    _, frozen, _, said = hung
    (message,) = re.findall("^error: .*$", said, re.MULTILINE)
    assert re.search(
        rf"rank 1 \(pid {frozen} on \S+\) has not answered for \d+ s; when last heard of it was in: ", message
    )
    assert re.search(r"waits? for it in: \w+.* step \d+", message)
    assert "start it again to go on from the newest checkpoint (engine.hang_timeout_s: 4 sets this time)" in message


def test_the_same_command_goes_on_to_the_same_end(folder: Path, hung: tuple[int | None, int, float, str]) -> None:
    commands = {output: command(folder, "run", output) for output in ("hung", "straight")}
    outcomes: dict[str, Outcome] = {name: of_ranks[0] for name, of_ranks in run_many(commands, folder, 2).items()}
    assert outcomes["hung"].code == 0, outcomes["hung"].stderr
    assert "resuming after step" in outcomes["hung"].stdout
    assert_same_run(folder / "hung/run", folder / "straight/run")
