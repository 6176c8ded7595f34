"""A run that is asked to stop saves, exits with 85, and goes on by the same command as if nothing had happened.

Each way to ask is used once in the middle of a long run on two ranks; then all of them are ended in one go, and
compared with the run that nobody stopped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.train.fault_rank import FAULTS_VARIABLE
from tests.train.helpers import (
    ROOT,
    TIMEOUT_S,
    TRAIN,
    Outcome,
    environment,
    free_port,
    read_lines,
    run_many,
    start_ranks,
    wait,
    write_samples,
    write_stage,
)
from tests.train.test_resume import LORA, assert_same_run, command

N_STEPS, ASKED_AFTER = 10, 4
BIN = Path(sys.executable).parent
WORKER = ROOT / "tests/train/fault_rank.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    write_samples(folder / "data.json", "itimtittiitmi")
    write_stage(
        folder / "run.yaml",
        engine={"zero": 2, "precision": "fp32"},
        trainable=LORA,
        schedule={"max_steps": N_STEPS, "epochs": 99},
        checkpoint={"every": 1000, "keep": 2},
        loader={"workers": 1},
    )
    return folder


def wait_until(reached: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    while not reached():
        assert is_alive(), "the run ended too early"
        time.sleep(0.005)


def n_logged(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def is_midway(folder: Path, output: str) -> Callable[[], bool]:
    return lambda: n_logged(folder / output / "run/metrics.jsonl") >= ASKED_AFTER


def waits_midway(output: str) -> str:
    """Faults: both ranks wait before a step until they are told to go on, and note a signal in a file."""
    files = {"until": f"{output}.asked", "noted": f"{output}.noted"}
    return json.dumps({rank: [["pause", {"step": ASKED_AFTER + 1, **files}]] for rank in range(2)})


def go_on(folder: Path, output: str, is_alive: Callable[[], bool], after_signal: bool) -> None:
    if after_signal:
        wait_until((folder / f"{output}.noted").exists, is_alive)
    (folder / f"{output}.asked").touch()


def asked(
    folder: Path, output: str, ask: Callable[[list[BaseProcess]], None], *more: Any, by_signal: bool = True
) -> list[int]:
    """Exit codes of the ranks of a run that was asked to stop midway."""

    def is_alive() -> bool:
        return all(rank.exitcode is None for rank in ranks)

    worker = ["-m", "tests.train.fault_rank", waits_midway(output)]
    ranks = start_ranks([*worker, *command(folder, "run", output), *more], folder, n_ranks=2)
    wait_until(is_midway(folder, output), is_alive)
    ask(ranks)
    go_on(folder, output, is_alive, by_signal)
    finished = wait(ranks, folder)
    said = finished.stdout[0].splitlines()[-1]
    assert "asked to stop by" in said, (said, finished.stderr)
    (folder / f"{output}.said").write_text(said)
    assert "Traceback" not in "".join(finished.stderr), finished.stderr
    return finished.codes


def launched(folder: Path, output: str, launcher: list[Any], to_rank: int | None, number: int) -> int:
    """Exit code of a launcher, to which (or to the process of a rank) a signal is sent midway."""
    line = [str(part) for part in [*launcher, WORKER, *command(folder, "run", output)]]
    env = environment(**{FAULTS_VARIABLE: waits_midway(output)})
    log = (folder / f"{output}.log").open("wb")
    process = subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)

    def is_alive() -> bool:
        return process.poll() is None

    try:
        wait_until(is_midway(folder, output), is_alive)
        os.kill(process.pid if to_rank is None else _process_of(process.pid, to_rank), number)
        go_on(folder, output, is_alive, after_signal=True)
        return process.wait(timeout=TIMEOUT_S)
    finally:
        log.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _process_of(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        is_rank = child.cmdline()[1:2] == ["-u"] or str(WORKER) in child.cmdline()[:3]
        if is_rank and child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError("no such rank")


@pytest.fixture(scope="module")
def codes(folder: Path) -> dict[str, Any]:
    """Exit codes by the way in which the run was asked to stop."""
    torchrun = [sys.executable, ROOT / "scripts/torchrun.py", "--nproc_per_node=2", f"--master_port={free_port()}"]
    deepspeed = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
    return {
        "SIGUSR1 to rank 1": asked(folder, "usr1", lambda ranks: os.kill(ranks[1].pid, signal.SIGUSR1)),
        "SIGTERM to the group of rank 0": asked(folder, "term", lambda ranks: os.killpg(ranks[0].pid, signal.SIGTERM)),
        "stop file of the run": asked(folder, "file", lambda _: (folder / "file/run/stop").touch(), by_signal=False),
        "stop file of the command": asked(
            folder, "given", lambda _: (folder / "stop-7").touch(), "--stop-file", folder / "stop-7", by_signal=False
        ),
        "torchrun, SIGUSR1 to rank 1": launched(folder, "torchrun-1", torchrun, 1, signal.SIGUSR1),
        "torchrun, SIGTERM to itself": launched(folder, "torchrun", torchrun, None, signal.SIGTERM),
        "deepspeed, SIGUSR1 to rank 0": launched(folder, "deepspeed-0", deepspeed, 0, signal.SIGUSR1),
    }


OUTPUTS = ("usr1", "term", "file", "given", "torchrun-1", "torchrun", "deepspeed-0")


@pytest.fixture(scope="module")
def ended(folder: Path, codes: dict[str, Any]) -> dict[str, Outcome]:
    for output in OUTPUTS:
        (folder / f"{output}.lines").write_text(str(n_logged(folder / output / "run/metrics.jsonl")))
    outcomes = run_many({output: command(folder, "run", output) for output in ("straight", *OUTPUTS)}, folder, 2)
    return {name: of_ranks[0] for name, of_ranks in outcomes.items()}


def test_every_rank_exits_with_85(codes: dict[str, Any]) -> None:
    for way in ("SIGUSR1 to rank 1", "SIGTERM to the group of rank 0", "stop file of the run"):
        assert codes[way] == [85, 85], way
    assert codes["stop file of the command"] == [85, 85]


def test_launchers_pass_it_on(codes: dict[str, Any]) -> None:
    assert codes["torchrun, SIGUSR1 to rank 1"] == 85
    assert codes["deepspeed, SIGUSR1 to rank 0"] == 85
    assert codes["torchrun, SIGTERM to itself"] == 128 + signal.SIGTERM  # whoever stops torchrun decides what follows


def test_the_log_says_who_asked_and_where_it_goes_on(folder: Path, codes: dict[str, Any]) -> None:
    said = {output: (folder / f"{output}.said").read_text() for output in ("usr1", "term", "file", "given")}
    assert "run: asked to stop by SIGUSR1 (rank 1), stopped after step " in said["usr1"]
    assert "asked to stop by SIGTERM (rank 0)" in said["term"]
    assert "asked to stop by file/run/stop (rank 0)" in said["file"]
    assert f"asked to stop by {folder / 'stop-7'} (rank 0)" in said["given"]
    for line in said.values():
        stopped, goes_on = re.search(
            rf"after step (\d+) of {N_STEPS}; the same command goes on after step (\d+)$", line
        ).groups()
        assert stopped == goes_on


def test_stop_files_are_gone(folder: Path, codes: dict[str, Any]) -> None:
    assert not (folder / "file/run/stop").exists()
    assert not (folder / "stop-7").exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_step_is_lost_and_the_end_is_the_same(output: str, folder: Path, ended: dict[str, Outcome]) -> None:
    outcome, n_done = ended[output], int((folder / f"{output}.lines").read_text())
    assert outcome.code == 0, outcome.stderr
    assert ASKED_AFTER <= n_done < N_STEPS
    assert f"resuming after step {n_done} of {N_STEPS}" in outcome.stdout
    assert [line["step"] for line in read_lines(folder / output / "run/metrics.jsonl")] == list(range(1, N_STEPS + 1))
    assert_same_run(folder / output / "run", folder / "straight/run")


def test_a_run_that_is_asked_before_its_first_step_ends_with_85_too(folder: Path) -> None:
    long = ["schedule.max_steps=9999", "schedule.epochs=9999"]
    ranks = start_ranks([TRAIN, *command(folder, "run", "early"), *long], folder, n_ranks=2)
    wait_until((folder / "early/run/config.yaml").is_file, lambda: all(rank.exitcode is None for rank in ranks))
    os.kill(ranks[0].pid, signal.SIGTERM)
    finished = wait(ranks, folder)
    assert finished.codes == [85, 85], finished.stderr
    assert "the same command goes on" in finished.stdout[0]
