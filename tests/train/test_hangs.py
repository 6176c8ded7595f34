"""A rank that stops answering ends the run, which names it; the same command goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_train.train.watchdog import EXIT_HUNG
from tests.train.helpers import TIMEOUT_S as HANGS_S
from tests.train.helpers import Outcome, ended, read_lines, run_many, start_ranks, write_samples, write_stage
from tests.train.test_resume import FULL, assert_same_run, command

N_STEPS, FROZEN_IN, TIMEOUT_S = 10, 5, 8.0


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
def hung(folder: Path) -> tuple[int | None, int, str]:
    """Exit code of rank 0, process of rank 1, and the words of rank 0, when rank 1 is frozen."""
    frozen = json.dumps({1: [["freeze_in_step", {"step": FROZEN_IN}]]})
    ranks = start_ranks(["-m", "tests.train.fault_rank", frozen, *command(folder, "run", "hung")], folder, n_ranks=2)
    ranks[0].join(HANGS_S)
    return ranks[0].exitcode, ranks[1].pid, ended(ranks, folder).stderr[0]


def test_a_frozen_rank_ends_the_run(folder: Path, hung: tuple[int | None, int, str]) -> None:
    assert hung[0] == EXIT_HUNG
    assert [line["step"] for line in read_lines(folder / "hung/run/metrics.jsonl")] == list(range(1, FROZEN_IN))


def test_the_message_names_the_rank_and_what_the_others_wait_in(hung: tuple[int | None, int, str]) -> None:
    _, frozen, said = hung
    (message,) = re.findall("^error: .*$", said, re.MULTILINE)
    assert re.search(
        rf"rank 1 \(pid {frozen} on \S+\) has not answered for \d+ s; when last heard of it was in: ", message
    )
    assert re.search(r"waits? for it in: \w+.* step \d+", message)
    assert "start it again to go on from the newest checkpoint (engine.hang_timeout_s: 8 sets this time)" in message


def test_the_same_command_goes_on_to_the_same_end(folder: Path, hung: tuple[int | None, int, str]) -> None:
    commands = {output: command(folder, "run", output) for output in ("hung", "straight")}
    outcomes: dict[str, Outcome] = {name: of_ranks[0] for name, of_ranks in run_many(commands, folder, 2).items()}
    assert outcomes["hung"].code == 0, outcomes["hung"].stderr
    assert "resuming after step" in outcomes["hung"].stdout
    assert_same_run(folder / "hung/run", folder / "straight/run")
