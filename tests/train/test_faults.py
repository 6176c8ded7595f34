"""Invariant 6: killed at any instant, on any rank, a run goes on by the same command as if nothing had happened.

Every fault befalls a real run of `scripts/train.py` (`fault_rank`), and the same command then ends it. What counts
is in `fault_runs.differences`: each line of metrics.jsonl once and with the same numbers, the weights of the result,
both bit for bit those of `straight`, a run that nothing befell; and nothing left over in the folder. `-s` shows the
table of all faults. LoRA trains with dropout, so that random numbers must go on as well.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.config import EngineSection
from llava_train.files import read_manifest, write_manifest
from llava_train.train.resume import CheckpointError, find_resumption
from llava_train.train.world import World
from tests.train.fault_runs import (
    Fault,
    Runs,
    Tally,
    differences,
    left_over,
    state_of,
    step_after_resume,
    unequal_states,
    whole_steps,
)
from tests.train.helpers import TIMEOUT_S, read_lines, write_samples, write_stage
from tests.train.test_resume import FULL, LORA

N_STEPS, EVERY = 6, 2
FIRST, LAST = EVERY, N_STEPS
"""Steps of the first and the last save. After the last one nothing follows that could tidy up."""

STAGES: dict[str, dict[str, Any]] = {
    "one": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": LORA},
    "two": {"engine": {"zero": 2, "precision": "fp32"}, "trainable": LORA},
    "sharded": {
        "engine": {"zero": 2, "precision": "fp32"},
        "trainable": FULL,
        "checkpoint": {"every": EVERY, "keep": 3},
    },
}
INTERRUPTED: dict[str, dict[str, Any]] = {
    "lora-two": {"engine": {"zero": 2, "precision": "fp32"}, "trainable": LORA},
    "projector": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": {"projector": {"lr": 1e-3}}},
    "full": {"engine": {"zero": 1, "precision": "fp32"}, "trainable": FULL},
    "lora": {"engine": {"zero": 0, "precision": "fp32"}, "trainable": LORA},
}
"""Runs of 9 steps, which log every 3 steps and save every 2: their windows are interrupted as well."""
N_RANKS = {"one": 1, "two": 2, "sharded": 1, "projector": 1, "full": 1, "lora": 1, "lora-two": 2}
DATA = [{"path": "data.json"}, {"path": "texts.json"}]
"""Two sources, whose losses metrics.jsonl tells apart; an epoch is no whole number of steps."""

MODEL_STATES, OPTIMIZER_STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_samples(folder / "data.json", "itimtittiitmi")
    write_samples(folder / "texts.json", "tttt")
    common: dict[str, Any] = {"data": DATA, "checkpoint": {"every": EVERY, "keep": 1}}
    for name, changes in STAGES.items():
        write_stage(folder / f"{name}.yaml", **{**common, **changes}, schedule={"max_steps": N_STEPS, "epochs": 9})
    for name, changes in INTERRUPTED.items():
        write_stage(
            folder / f"{name}.yaml",
            **{**common, **changes, "checkpoint": {"every": EVERY, "keep": 2}},
            schedule={"max_steps": 9, "epochs": 9, "weight_decay": 0.1},
            logging={"every": 3},
        )
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs(folder)


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
def straight(folder: Path, runs: Runs) -> dict[str, Path]:
    """The run of each stage that nothing befalls; each rank's boundaries of each phase are recorded on the way."""

    def run(case: tuple[str, int]) -> None:
        stage, rank = case
        recorded = [(f"save-{step}", "save", step) for step in (FIRST, LAST)] + [("result", "result", 0)]
        output = f"straight-{rank}"
        faults = [
            boundaries(f"{output}/{stage}", phase, step, record=f"{stage}-{rank}-{name}.json")
            for name, phase, step in recorded
        ]
        runs.run(stage, output, *faults, n_ranks=N_RANKS[stage], rank=rank).check()

    runs.map(run, [("two", 0), ("two", 1), ("one", 0), ("sharded", 0)])
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
    killed: bool = False
    """Killed for real; otherwise the folder is copied as a kill would leave it."""
    problems: list[str] = field(default_factory=list)
    state: str = ""
    resumed: int = 0

    @property
    def output(self) -> str:
        return self.outputs.format(self.number) + "-killed" * self.killed

    @property
    def outputs(self) -> str:
        """`output` of the points of a run, with `{}` for the number."""
        return f"killed-{self.stage}-{self.rank}-{self.phase}-{self.step}{'-torn' * self.torn}-{{}}"

    def __str__(self) -> str:
        torn = ", the last file half written" * self.torn
        return f"{self.phase} {self.step}, rank {self.rank}, before {self.number}. {self.event!r}{torn}"


def survive(
    points: list[Point],
    folder: Path,
    runs: Runs,
    straight: dict[str, Path],
    least: int,
    base: Path | None = None,
    keep: int = 1,
) -> int:
    """Ends a run that was killed at each point by the same command; notes problems. Returns how many states were ended.

    What two points left alike is ended once. The one in the middle is killed for real, of the others the folder is copied
    in the moment of the kill: what a process has not written by then it does not write when it is killed.

    Args:
        least: the step of the checkpoint that must have outlived every kill.
        base: the run's folder before; by default it starts from the beginning.
    """

    def run_to(point: Point, output: str, **fault: Any) -> Any:
        if base:
            shutil.copytree(base, folder / output / point.stage)
        where = (f"{output}/{point.stage}", point.phase, point.step)
        of_point = {"n_ranks": N_RANKS[point.stage], "rank": point.rank}
        return runs.run(point.stage, output, boundaries(*where, torn=point.torn, **fault), **of_point)

    def copy(point: Point) -> None:
        run_to(point, point.outputs.format("all"), copies=point.outputs).check()

    def leave(point: Point) -> None:
        run = folder / point.output / point.stage
        if point.killed:
            ended = run_to(point, point.output, kill_at=point.number)
            if ended.codes[point.rank] != -9:
                point.problems.append(f"was not killed: {ended.codes} {ended.stderr}")
        if max(whole_steps(run), default=0) < least:
            point.problems.append(f"no whole checkpoint of step {least} or later: {whole_steps(run)}")
        point.state = state_of(run)

    def end(point: Point) -> None:
        run = folder / point.output / point.stage
        newest = max(whole_steps(run), default=0)
        ended = runs.run(point.stage, point.output, n_ranks=N_RANKS[point.stage])
        point.resumed = step_after_resume(ended.stdout[0])
        if any(ended.codes):
            point.problems.append(f"does not go on: {ended.codes} {ended.stderr}")
            return
        if point.resumed != newest:
            point.problems.append(f"went on after step {point.resumed}, not {newest}")
        point.problems += differences(run, straight[point.stage], keep)

    points[len(points) // 2].killed = True
    runs.map(copy, {point.torn: point for point in points}.values())
    runs.map(leave, points)
    distinct = list({point.state: point for point in points}.values())
    runs.map(end, distinct)
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
    runs: Runs,
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
    assert set(expected) <= set(events), events
    if rank == 0 and step == LAST:
        assert any(event.startswith("rmdir ") and f"{step - EVERY:08d}" in event for event in events), events

    n_ended = survive(points, folder, runs, straight, least=step - EVERY)

    wrong = sum(bool(point.problems) for point in points)
    lost = max(step - point.resumed for point in points)
    fault = f"killed in a save, {stage} rank{'s' * (stage == 'two')}, rank {rank}"
    count(fault, len(points), len(points) - wrong, lost, wrong)
    assert n_ended > 1, "every kill left the same behind"
    assert_survived(points)


@pytest.fixture(scope="module")
def bases(folder: Path, runs: Runs, straight: dict[str, Path]) -> dict[str, Path]:
    """Runs that were killed before their last step, and before their result."""
    cases: dict[str, tuple[str, list[Fault], tuple[str, ...]]] = {
        "step": ("one", [("kill_in_step", {"step": N_STEPS})], ()),
        "result": ("one", [boundaries("base-result/one", "result", kill_at=1)], ()),
        "kept": ("one", [boundaries("base-kept/one", "result", kill_at=1)], ("checkpoint.keep=3",)),
        "sharded": ("sharded", [boundaries("base-sharded/sharded", "result", kill_at=1)], ()),
    }

    def run(name: str) -> None:
        stage, faults, settings = cases[name]
        assert runs.run(stage, f"base-{name}", *faults, settings=settings).codes == [-9]

    runs.map(run, cases)
    found = {name: folder / f"base-{name}" / stage for name, (stage, *_) in cases.items()}
    for step in (4, 6):  # the newer two of three
        state = found["kept"] / f"checkpoints/step-{step:08d}" / MODEL_STATES
        state.write_bytes(state.read_bytes()[:-1])
    return found


def recorded(folder: Path, runs: Runs, base: Path, phase: str, step: int = 0) -> None:
    """Records the boundaries of a phase in a run that goes on from `base`."""
    output, name = f"recorded-{base.parent.name}", f"one-0-{phase}-{step}" if step else f"one-0-{phase}"
    shutil.copytree(base, folder / output / "one")
    fault = boundaries(f"{output}/one", phase, step, record=f"{name}.json")
    runs.map(lambda _: runs.run("one", output, fault).check(), [None])


def test_a_run_killed_at_any_boundary_of_its_start_goes_on_as_if_nothing_had_happened(
    folder: Path, runs: Runs, straight: dict[str, Path], bases: dict[str, Path], count: Callable[..., None]
) -> None:
    recorded(folder, runs, bases["step"], "start")
    points = points_of(folder, "one", 0, "start")
    events = {point.event for point in points}
    assert {"rename metrics.jsonl.tmp -> metrics.jsonl", "fsync metrics.jsonl.tmp"} <= events, events
    assert [line["step"] for line in read_lines(bases["step"] / "metrics.jsonl")][-1] == 5, "nothing to drop"

    survive(points, folder, runs, straight, least=4, base=bases["step"])

    wrong = sum(bool(point.problems) for point in points)
    count("killed while it resumes", len(points), len(points) - wrong, 5 - min(p.resumed for p in points), wrong)
    assert_survived(points)


def test_a_run_killed_at_any_boundary_of_its_result_goes_on_as_if_nothing_had_happened(
    folder: Path, runs: Runs, straight: dict[str, Path], bases: dict[str, Path], count: Callable[..., None]
) -> None:
    """Some files are written by Rust, which raises no event: killed at the next one, half of them is cut off."""
    points = [point for point in points_of(folder, "one", 0, "result", torn=True)[1:] if "mkdir" not in point.event]
    points += [point for point in points_of(folder, "one", 0, "result") if "COMPLETE" in point.event]
    events = {point.event for point in points}
    assert {"open model/config.json", "rename model/COMPLETE.tmp -> model/COMPLETE"} <= events, events

    survive(points, folder, runs, straight, least=N_STEPS, base=bases["result"])

    wrong = sum(bool(point.problems) for point in points)
    count("killed while it writes its result", len(points), len(points) - wrong, 0, wrong)
    assert_survived(points)


def test_resumed_from_an_older_checkpoint_a_run_always_has_a_whole_one(
    folder: Path, runs: Runs, straight: dict[str, Path], bases: dict[str, Path], count: Callable[..., None]
) -> None:
    """`keep: 1` with two damaged checkpoints that are newer."""
    recorded(folder, runs, bases["kept"], "save", 4)
    points = points_of(folder, "one", 0, "save", 4)
    complete = next(point.number for point in points if point.event.startswith("rename") and "COMPLETE" in point.event)
    points = points[complete - 1 :]  # before, nothing is renamed or deleted
    assert whole_steps(bases["kept"]) == [2]

    survive(points, folder, runs, straight, least=2, base=bases["kept"])

    wrong = sum(bool(point.problems) for point in points)
    fault = "killed in a save, newer checkpoints damaged"
    count(fault, len(points), len(points) - wrong, 4 - min(point.resumed for point in points), wrong)
    assert_survived(points)


# --- Killed between two checkpoints, again and again ------------------------------------------------------------------

KILLED_IN = (4, 5, 8)
"""Steps of 9, with a checkpoint every 2; the first loses a logged line. An epoch ends within step 5."""


@pytest.fixture(scope="module")
def interruptions(folder: Path, runs: Runs) -> dict[str, list[Any]]:
    """What each run said: killed thrice, and then to its end."""

    def run(name: str) -> list[Any]:
        n_ranks = N_RANKS[name]
        runs.run(name, "through", n_ranks=n_ranks).check()
        ended = []
        for step in KILLED_IN:
            kill: Fault = ("kill_in_step", {"step": step})
            grace_s = TIMEOUT_S if n_ranks > 1 and step == KILLED_IN[0] else 0
            ended.append(runs.run(name, "interrupted", kill, n_ranks=n_ranks, rank=n_ranks - 1, grace_s=grace_s))
        return [*ended, runs.run(name, "interrupted", n_ranks=n_ranks)]

    return dict(zip(INTERRUPTED, runs.map(run, INTERRUPTED), strict=True))


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_run_killed_in_several_steps_equals_the_uninterrupted_one(
    name: str, folder: Path, interruptions: dict[str, list[Any]], count: Callable[..., None]
) -> None:
    *killed, last = interruptions[name]
    assert [ended.codes[-1] for ended in killed] == [-9] * len(KILLED_IN)
    assert [step_after_resume(ended.stdout[0]) for ended in [*killed, last]] == [0, 2, 4, 6]
    last.check()
    run, through = folder / "interrupted" / name, folder / "through" / name
    found = differences(run, through, keep=2)
    for step in (8, 9):
        checkpoint = f"checkpoints/step-{step:08d}"
        found += [f"step {step}: {place}" for place in unequal_states(run / checkpoint, through / checkpoint)]
    fault = f"killed between checkpoints, {N_RANKS[name]} rank{'s' * (N_RANKS[name] > 1)}"
    count(fault, len(KILLED_IN), 0 if found else len(KILLED_IN), 1, len(KILLED_IN) if found else 0)
    assert not found, "\n".join(found)


def test_the_interrupted_windows_of_the_log_hold_several_sources(folder: Path, interruptions: object) -> None:
    lines = read_lines(folder / "through/lora-two/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6, 9]
    assert all(len(line["sources"]) == 2 for line in lines[1:]), lines


def test_when_one_rank_is_killed_the_other_ends_by_itself(interruptions: dict[str, list[Any]]) -> None:
    ended = interruptions["lora-two"][0]
    assert ended.codes[0] not in (0, -9), "it was killed after a long time"


# --- Damaged checkpoints ----------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    """In the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    """Nothing is left but the manifest."""
    for other in path.glob("*.pt"):
        other.unlink()


def other_sizes(path: Path) -> None:
    """A manifest of another checkpoint of the same step."""
    manifest = read_manifest(path)
    assert manifest is not None
    for facts in manifest["files"].values():
        facts["n_bytes"] += 1
    write_manifest(path, **manifest)


def copy_as_best(path: Path) -> None:
    shutil.copytree(path.with_name("step-00000002"), path.with_name("step-best"))


def of_all(damage: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    def of_all(path: Path) -> None:
        for checkpoint in path.parent.glob("step-*"):
            damage(checkpoint / name)

    return of_all


DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "a flipped bit in model states": (lambda path: flip_bit(path / MODEL_STATES), 4, "has another checksum"),
    "a flipped bit in optimizer states": (lambda path: flip_bit(path / OPTIMIZER_STATES), 4, "has another checksum"),
    "half of the optimizer states": (lambda path: cut(path / OPTIMIZER_STATES), 4, "bytes, not"),
    "no optimizer states": (lambda path: (path / OPTIMIZER_STATES).unlink(), 4, f"{OPTIMIZER_STATES} is missing"),
    "an empty manifest": (lambda path: (path / "COMPLETE").write_text(""), 4, "no readable COMPLETE manifest"),
    "half of the manifest": (lambda path: cut(path / "COMPLETE"), 4, "no readable COMPLETE manifest"),
    "a manifest that is no JSON": (lambda path: (path / "COMPLETE").write_text("yes"), 4, "no readable COMPLETE"),
    "a manifest without files": (lambda path: (path / "COMPLETE").write_text('{"files": null}'), 4, "COMPLETE"),
    "a manifest of other sizes": (other_sizes, 4, "bytes, not"),
    "a manifest alone": (empty, 4, "is missing"),
    "an older one under another name": (copy_as_best, 6, ""),
    "a file in the place of a checkpoint": (lambda path: path.with_name("step-00000008").touch(), 6, "step-00000008"),
}
"""What is done to the newest of the checkpoints of steps 2, 4 and 6; where the run goes on; what it says."""


@pytest.fixture(scope="module")
def damaged(folder: Path, runs: Runs, bases: dict[str, Path]) -> dict[str, Any]:
    def run(name: str) -> Any:
        output = "damaged-" + name.replace(" ", "-")
        shutil.copytree(bases["sharded"], folder / output / "sharded")
        DAMAGE[name][0](folder / output / "sharded/checkpoints/step-00000006")
        return runs.run("sharded", output)

    return dict(zip(DAMAGE, runs.map(run, DAMAGE), strict=True))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    name: str, folder: Path, damaged: dict[str, Any], straight: dict[str, Path], count: Callable[..., None]
) -> None:
    _, step, message = DAMAGE[name]
    ended = damaged[name]
    right = ended.codes == [0]
    run = folder / ("damaged-" + name.replace(" ", "-")) / "sharded"
    found = differences(run, straight["sharded"]) if right else ["does not go on"]
    found = [one for one in found if "step-best" not in one and "incomplete checkpoints" not in one]
    count("damaged checkpoints", 1, int(not found), N_STEPS - step, int(bool(found)))
    assert right, ended.stderr
    said = [line for line in ended.stdout[0].splitlines() if line.startswith("passed over ")]
    assert step_after_resume(ended.stdout[0]) == step, said
    assert not message or any(message in line for line in said), said
    assert not found


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Neither does it end the run with a traceback."""
    checkpoint = tmp_path / "step-00000006"
    shutil.copytree(bases["sharded"] / "checkpoints/step-00000006", checkpoint)
    world, engine = World(0, 1, torch.device("cpu")), EngineSection(zero=2, precision="fp32")
    manifest, content = read_manifest(checkpoint), (checkpoint / "COMPLETE").read_bytes()
    assert find_resumption(world, tmp_path, engine).checkpoint == checkpoint
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (checkpoint / "COMPLETE").write_bytes(changed)
        with suppress(CheckpointError):  # there is no other
            assert find_resumption(world, tmp_path, engine).manifest == manifest, changed.decode(errors="replace")


@pytest.mark.parametrize("damage", [of_all(flip_bit, MODEL_STATES), of_all(Path.unlink, "COMPLETE")])
def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_in_silence(
    damage: Callable[[Path], None], tmp_path: Path, bases: dict[str, Path]
) -> None:
    shutil.copytree(bases["sharded"] / "checkpoints", tmp_path / "run/checkpoints")
    damage(tmp_path / "run/checkpoints/step-00000006")
    world, engine = World(0, 1, torch.device("cpu")), EngineSection(zero=2, precision="fp32")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be used") as told:
        find_resumption(world, tmp_path / "run/checkpoints", engine)
    for step in (2, 4, 6):
        assert f"step-{step:08d}: " in str(told.value)
    assert f"or move {tmp_path / 'run'} away to begin anew" in str(told.value)


# --- Writes that fail -------------------------------------------------------------------------------------------------

FAILING = 4
"""The save that fails."""
MOUNTED = ("disk full", "read-only file system")
"""These take a file system of their own, and so root."""
FAILURES: dict[str, tuple[str, int, str]] = {
    "file too large on rank 0": ("two", 0, "rank 0: cannot write"),
    "file too large on rank 1": ("two", 1, "rank 1: cannot write"),
    "file too large": ("one", 0, "File too large"),
    "disk full": ("one", 0, "No space left on device"),
    "read-only file system": ("one", 0, "Read-only file system"),
    "little room": ("one", 0, "GB left, and it takes about"),
    "a file in the place of the folder": ("one", 0, "checkpoints"),
    "disk full at the manifest": ("one", 0, "No space left on device"),
}
"""Stage, rank, and what the warning says."""


def failing(name: str, run: Path, n_bytes: int) -> list[Fault]:
    """The faults that make the save of step `FAILING` fail; a checkpoint takes `n_bytes`."""
    checkpoints = run / "checkpoints"
    mounting = f"mount -o remount,{{}} {checkpoints}"
    if name.startswith("file too large"):
        return [("limit_file_size", {"step": FAILING, "n_bytes": n_bytes // 8})]
    if name == "disk full":
        larger: Fault = ("shell", {"step": FAILING, "before": "true", "after": mounting.format("size=64m")})
        return [("claim_room", {"step": FAILING, "n_bytes": 1 << 30}), larger]  # as if another job filled it
    if name == "read-only file system":
        return [("shell", {"step": FAILING, "before": mounting.format("ro"), "after": mounting.format("rw")})]
    if name == "little room":
        return [("claim_room", {"step": FAILING, "n_bytes": n_bytes - 1})]
    if name == "a file in the place of the folder":
        away = f"mv {checkpoints} {run}/away"
        before, after = f"{away} && touch {checkpoints}", f"rm {checkpoints} && mv {run}/away {checkpoints}"
        return [("shell", {"step": FAILING, "before": before, "after": after})]
    assert name == "disk full at the manifest"
    return [("no_space_for_manifest", {"step": FAILING})]


def mount(run: Path, n_bytes: int) -> bool:
    """Gives the checkpoints of a run a disk of their own. Returns whether that is allowed here."""
    (run / "checkpoints").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(run / "checkpoints")]
    try:
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


@dataclass
class Failure:
    """What came of a run whose save failed: to its end, and killed soon after the failure and then to its end."""

    ended: Any
    at_end: list[str]
    killed: Any
    whole: list[int]
    left: list[str]
    resumed: Any
    after_resume: list[str]


@pytest.fixture(scope="module")
def failures(folder: Path, runs: Runs, straight: dict[str, Path]) -> Iterator[dict[str, Failure | None]]:
    mounted: list[Path] = []

    def run(name: str) -> Failure | None:
        stage, rank, _ = FAILURES[name]
        n_ranks = N_RANKS[stage]
        manifest = read_manifest(straight[stage] / f"checkpoints/step-{N_STEPS:08d}")
        assert manifest is not None
        n_bytes = sum(facts["n_bytes"] for facts in manifest["files"].values())
        outputs = ["failed-" + name.replace(" ", "-"), "failed-and-killed-" + name.replace(" ", "-")]
        run_dirs = [folder / output / stage for output in outputs]
        if name in MOUNTED:
            for run_dir in run_dirs:
                if not mount(run_dir, n_bytes * (3 if name == MOUNTED[0] else 30) // 2):
                    return None
                mounted.append(run_dir)
        faults = [failing(name, run_dir, n_bytes) for run_dir in run_dirs]
        ended = runs.run(stage, outputs[0], *faults[0], n_ranks=n_ranks, rank=rank)
        at_end = differences(run_dirs[0], straight[stage], keep=1)
        kill: Fault = ("kill_in_step", {"step": FAILING + 1})
        killed = runs.run(stage, outputs[1], *faults[1], kill, n_ranks=n_ranks, rank=rank)
        whole, left = whole_steps(run_dirs[1]), left_over(run_dirs[1], keep=1)
        resumed = runs.run(stage, outputs[1], n_ranks=n_ranks)
        return Failure(ended, at_end, killed, whole, left, resumed, differences(run_dirs[1], straight[stage], keep=1))

    yield dict(zip(FAILURES, runs.map(run, FAILURES), strict=True))
    for run_dir in mounted:
        subprocess.run(["umount", "-l", str(run_dir / "checkpoints")], check=True)


@pytest.fixture
def failure(name: str, failures: dict[str, Failure | None]) -> Failure:
    found = failures[name]
    if found is None:
        pytest.skip("no root: a disk that is full takes a mount")
    return found


@pytest.mark.parametrize("name", FAILURES)
def test_a_save_that_fails_warns_and_training_goes_on(name: str, failure: Failure, count: Callable[..., None]) -> None:
    wrong = bool(failure.at_end or failure.after_resume)
    count(f"a save fails: {name}", 2, 2 * (not wrong), 2, int(wrong))
    failure.ended.check()
    warnings = [line for line in failure.ended.stdout[0].splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings] == [f"no checkpoint of step {FAILING}"], warnings
    assert FAILURES[name][2] in warnings[0]
    assert failure.at_end == []


@pytest.mark.parametrize("name", FAILURES)
def test_a_save_that_fails_keeps_the_last_good_checkpoint_and_leaves_no_half_one(name: str, failure: Failure) -> None:
    assert -9 in failure.killed.codes
    assert failure.whole == [FAILING - EVERY]
    assert failure.left == []
    failure.resumed.check()
    assert step_after_resume(failure.resumed.stdout[0]) == FAILING - EVERY
    assert failure.after_resume == []


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_hinders_no_later_save(
    folder: Path, runs: Runs, straight: dict[str, Path], count: Callable[..., None]
) -> None:
    checkpoints = folder / "immutable/one/checkpoints"
    immutable = f"chattr +i {checkpoints}/step-{FIRST:08d}/{MODEL_STATES}"
    fault: Fault = ("shell", {"step": FAILING, "before": f"{immutable} || touch cannot", "after": "true"})
    [ended] = runs.map(lambda _: runs.run("one", "immutable", fault), [None])
    subprocess.run(["chattr", "-R", "-i", str(checkpoints)], check=False, stderr=subprocess.DEVNULL)
    if (folder / "cannot").exists():
        pytest.skip("no root, or a file system without immutable files")
    ended.check()
    warnings = [line for line in ended.stdout[0].splitlines() if line.startswith("warning: ")]
    assert [line.rpartition(": ")[2] for line in warnings] == ["Operation not permitted"], warnings
    assert f"cannot delete immutable/one/checkpoints/step-{FIRST:08d}" in warnings[0]
    assert whole_steps(folder / "immutable/one") == [N_STEPS]
    assert [line for line in differences(folder / "immutable/one", straight["one"]) if "left: .step" not in line] == []
    count("an old checkpoint cannot be deleted", 1, 1)
