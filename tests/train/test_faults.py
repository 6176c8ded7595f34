"""Invariant 6: killed at any instant, on any rank, a run goes on by the same command as if nothing had happened.

Every fault befalls a real run of `scripts/train.py` (`fault_worker`), and the same command then ends it. What counts
is in `fault_runs.differences`: each line of metrics.jsonl once and with the same numbers, the weights of the result,
both bit for bit those of `straight`, a run that nothing befell; and nothing left over in the folder. `-s` shows the
table of all faults. LoRA trains with dropout, so that random numbers must go on as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.config import EngineSection
from llava_train.files import read_manifest
from llava_train.train.resume import find_resumption
from llava_train.train.world import World
from tests.train.fault_runs import (
    Fault,
    Tally,
    Worker,
    Workers,
    differences,
    left_over,
    state_of,
    step_after_resume,
    unequal_states,
    whole_steps,
)
from tests.train.helpers import read_lines, write_samples, write_stage
from tests.train.test_resume import FULL, LORA

N_STEPS, EVERY = 6, 2
FIRST, LAST = EVERY, N_STEPS
"""Steps of the first and the last save. After the last one nothing follows that could tidy up."""

STAGES: dict[str, dict[str, Any]] = {
    "one": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": LORA},
    "two": {"engine": {"zero": 2, "precision": "fp32"}, "trainable": LORA},
}
"""By number of ranks."""
N_RANKS = {"one": 1, "two": 2}
DATA = [{"path": "data.json"}, {"path": "texts.json"}]
"""Two sources, whose losses metrics.jsonl tells apart; an epoch is no whole number of steps."""

MODEL_STATES, OPTIMIZER_STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_samples(folder / "data.json", "itimtittiitmi")
    write_samples(folder / "texts.json", "ttt")
    common: dict[str, Any] = {"data": DATA, "checkpoint": {"every": EVERY, "keep": 1}}
    for name, changes in STAGES.items():
        write_stage(folder / f"{name}.yaml", **changes, **common, schedule={"max_steps": N_STEPS, "epochs": 9})
    for name, changes in INTERRUPTED.items():
        write_stage(
            folder / f"{name}.yaml",
            **{**common, **changes, "checkpoint": {"every": EVERY, "keep": 2}},
            schedule={"max_steps": 9, "epochs": 9, "weight_decay": 0.1},
            logging={"every": 3},
        )
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[Workers]:
    workers = Workers(folder, "one")
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    print()
    tally.show()


@pytest.fixture
def count(tally: Tally, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds to the table, and to the properties of the test."""

    def count(fault: str, injected: int, recovered: int, lost: int = 0, wrong: int = 0) -> None:
        tally.count(fault, injected, recovered, lost, wrong)
        record_property("fault", f"{fault}: {injected} injected, {recovered} recovered, {wrong} wrong after")

    return count


def boundaries(run: str, phase: str, step: int = 0, **more: Any) -> Fault:
    return "boundaries", {"folder": run, "phase": phase, "step": step, **more}


@pytest.fixture(scope="module")
def straight(folder: Path, workers: Workers) -> dict[str, Path]:
    """The run of each stage that nothing befalls; each rank's boundaries of each phase are recorded on the way."""

    def run(worker: Worker, case: tuple[str, int]) -> None:
        stage, rank = case
        recorded = [(f"save-{step}", "save", step) for step in (FIRST, LAST)] + [("result", "result", 0)]
        output = f"straight-{rank}"
        faults = [
            boundaries(f"{output}/{stage}", phase, step, record=f"{stage}-{rank}-{name}.json")
            for name, phase, step in recorded
        ]
        worker.run(stage, output, *faults, n_ranks=N_RANKS[stage], rank=rank).check()

    workers.map(run, [("one", 0), ("two", 0), ("two", 1)])
    return {stage: folder / "straight-0" / stage for stage in STAGES}


# --- Killed at every boundary -----------------------------------------------------------------------------------------


@dataclass
class Point:
    """Where a run is killed, and what became of it."""

    stage: str
    rank: int
    phase: str
    step: int
    number: int
    event: str
    torn: bool = False
    settings: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    state: str = ""
    resumed: int = 0

    @property
    def output(self) -> str:
        torn, settings = "-torn" * self.torn, "-".join(self.settings)
        return f"killed-{self.stage}-{self.rank}-{self.phase}-{self.step}-{self.number}{torn}{settings}"

    def __str__(self) -> str:
        torn = ", the last file half written" * self.torn
        return f"{self.phase} {self.step}, rank {self.rank}, before {self.number}. {self.event!r}{torn}"


def survive(
    points: list[Point],
    folder: Path,
    workers: Workers,
    straight: dict[str, Path],
    least: int,
    base: Path | None = None,
    keep: int = 1,
) -> int:
    """Kills a run at each point and ends it by the same command; notes problems. Returns how many states were ended.

    What two points left alike is ended once.

    Args:
        least: the step of the checkpoint that must have outlived every kill.
        base: the run's folder before; by default it starts from the beginning.
    """

    def kill(worker: Worker, point: Point) -> None:
        run = folder / point.output / point.stage
        if base:
            shutil.copytree(base, run)
        fault = boundaries(
            f"{point.output}/{point.stage}", point.phase, point.step, kill_at=point.number, torn=point.torn
        )
        ended = worker.run(
            point.stage,
            point.output,
            fault,
            n_ranks=N_RANKS[point.stage],
            rank=point.rank,
            settings=point.settings,
        )
        if ended.codes[point.rank] != -9:
            point.problems.append(f"was not killed: {ended.codes} {ended.stderr}")
        if max(whole_steps(run), default=0) < least:
            point.problems.append(f"no whole checkpoint of step {least} or later: {whole_steps(run)}")
        point.state = state_of(run)

    def end(worker: Worker, point: Point) -> None:
        run = folder / point.output / point.stage
        newest = max(whole_steps(run), default=0)
        ended = worker.run(point.stage, point.output, n_ranks=N_RANKS[point.stage], settings=point.settings)
        point.resumed = step_after_resume(ended.stdout[0])
        if any(ended.codes):
            point.problems.append(f"does not go on: {ended.codes} {ended.stderr}")
            return
        if point.resumed != newest:
            point.problems.append(f"went on after step {point.resumed}, not {newest}")
        point.problems += differences(run, straight[point.stage], keep)

    workers.map(kill, points)
    distinct = list({point.state: point for point in points}.values())
    workers.map(end, distinct)
    ended = {point.state: point for point in distinct}
    for point in points:
        point.resumed = ended[point.state].resumed
        if point is not ended[point.state]:
            point.problems += ended[point.state].problems
    return len(distinct)


def points_of(folder: Path, stage: str, rank: int, phase: str, step: int = 0, **more: Any) -> list[Point]:
    """Every boundary of a phase, as the run that nothing befell recorded them."""
    name = f"{phase}-{step}" if step else phase
    events = json.loads((folder / f"{stage}-{rank}-{name}.json").read_text())
    return [Point(stage, rank, phase, step, number, event, **more) for number, event in enumerate(events, start=1)]


def assert_survived(points: list[Point]) -> None:
    wrong = [f"killed at {point}: {point.problems}" for point in points if point.problems]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("stage", "rank", "step"), [("one", 0, FIRST), ("one", 0, LAST), ("two", 0, LAST), ("two", 1, LAST)]
)
def test_a_run_killed_at_any_boundary_of_a_save_goes_on_as_if_nothing_had_happened(
    stage: str,
    rank: int,
    step: int,
    folder: Path,
    workers: Workers,
    straight: dict[str, Path],
    count: Callable[..., None],
) -> None:
    points = points_of(folder, stage, rank, "save", step)
    events = [point.event for point in points]
    saving, target = f"checkpoints/.step-{step:08d}.saving", f"checkpoints/step-{step:08d}"
    of_rank = OPTIMIZER_STATES.replace("rank_0", f"rank_{rank}", 1)
    expected = [f"{kind} {saving}/{of_rank}" for kind in ("open", "fsync") if stage == "two"]
    if rank == 0:
        expected += [f"open {saving}/{MODEL_STATES}", f"open {saving}/COMPLETE.tmp", f"rename {saving} -> {target}"]
    if rank == 0 and step == LAST:  # that the older one is deleted
        expected += [f"rmdir checkpoints/{name}" for name in _deleted(step - EVERY, events)]
    assert set(expected) <= set(events), events

    n_ended = survive(points, folder, workers, straight, least=step - EVERY)

    wrong = sum(bool(point.problems) for point in points)
    lost = max(step - point.resumed for point in points)
    fault = f"killed in a save, {stage} rank{'s' * (stage == 'two')}, rank {rank}"
    count(fault, len(points), len(points) - wrong, lost, wrong)
    assert n_ended > 1, "every kill left the same behind"
    assert_survived(points)


def _deleted(step: int, events: list[str]) -> list[str]:
    """The name under which the checkpoint of a step was deleted."""
    return [event.removeprefix("rmdir checkpoints/") for event in events if f"{step:08d}" in event and "rmdir" in event]
