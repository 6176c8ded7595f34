"""Starts runs that a fault befalls, looks at what they leave, and counts; see `fault_rank`."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from llava_train.files import damage
from llava_train.train.checkpoint import all_checkpoints, complete_checkpoints
from llava_train.train.checkpoint_files import SAFE_CLASSES
from tests.train.helpers import Finished, read_lines, start_ranks, wait

Item, Result = TypeVar("Item"), TypeVar("Result")
Fault = tuple[str, dict[str, Any]]
"""A function of `fault_rank` and its arguments."""

METRICS = ("step", "loss", "grad_norm", "lr", "n_supervised", "sources", "n_bad")
"""What a line of metrics.jsonl says beside times."""


class Runs:
    """Runs of stage files in a folder, two at a time: one a core of a small machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._numbers = folder, itertools.count()

    def run(
        self,
        stage: str,
        output: str,
        *faults: Fault,
        n_ranks: int = 1,
        rank: int = 0,
        settings: Iterable[str] = (),
        grace_s: float = 0.0,
    ) -> Finished:
        """Runs a stage with `output`, on its ranks, the faults on one of them.

        Args:
            grace_s: how long the others may go on after a rank has failed; by default none may, as under a launcher.
        """
        said = self.folder / f"said-{next(self._numbers)}"
        said.mkdir()
        worker = ["-m", "tests.train.fault_rank", json.dumps({rank: faults})]
        arguments = [*worker, "--config", f"{stage}.yaml", "--set", f"output={output}", *settings]
        return wait(start_ranks(arguments, self.folder, n_ranks, said), said, grace_s=grace_s)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of each item, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, items))


@dataclass
class Tally:
    """How often each fault was injected, and how the runs went on."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def count(self, fault: str, injected: int, recovered: int, lost: int, wrong: int) -> None:
        """Adds to a fault: how often it was injected, how many went on to the right end, steps lost at most."""
        row = self.rows.setdefault(fault, [0, 0, 0, 0])
        row[:] = row[0] + injected, row[1] + recovered, max(row[2], lost), row[3] + wrong

    def show(self) -> None:
        table = Table("fault", "injected", "recovered", "steps lost at most", "wrong after")
        for fault, row in self.rows.items():
            table.add_row(fault, *map(str, row))
        table.add_row("all", str(sum(r[0] for r in self.rows.values())), str(sum(r[1] for r in self.rows.values())))
        Console(width=120).print(table)


def whole_steps(run: Path) -> list[int]:
    """The steps of the checkpoints whose files are all as they should be, newest first."""
    return [_step(path) for path in all_checkpoints(run / "checkpoints") if damage(path) is None]


def step_after_resume(said: str) -> int:
    """After which step a run says that it goes on."""
    return next((int(line.split()[3]) for line in said.splitlines() if line.startswith("resuming after step")), 0)


def state_of(run: Path) -> str:
    """One word for all that decides how a run goes on: two runs with the same go on alike."""
    digest = hashlib.sha256()
    for path in sorted(run.rglob("*")):
        if path.name == ".lock":
            continue
        digest.update(f"\n{path.relative_to(run)} ".encode())
        if path.name == "metrics.jsonl":
            digest.update(json.dumps(deterministic(run)).encode())
        elif path.is_file():
            digest.update(path.read_bytes().replace(str(run.parent.name).encode(), b"OUTPUT"))
    return digest.hexdigest()


def deterministic(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times."""
    return [{key: line[key] for key in METRICS} for line in read_lines(run / "metrics.jsonl")]


def differences(run: Path, straight: Path, keep: int | None = None) -> list[str]:
    """What tells a run from the uninterrupted one, bit by bit, and what should not lie in its folder."""
    found = []
    ours, expected = deterministic(run), deterministic(straight)
    if ours != expected:
        steps = [line["step"] for line in ours]
        wrong = [a["step"] for a, b in zip(ours, expected, strict=False) if a != b]
        found.append(f"metrics.jsonl has steps {steps}, and differs at {wrong}")
    if (reason := damage(run / "model")) is not None:
        return [*found, f"model: {reason}"]
    weights, wanted = weights_of(run), weights_of(straight)
    if weights.keys() != wanted.keys():
        found.append(f"weights: {weights.keys() ^ wanted.keys()}")
    found += [f"weight {name}" for name in weights if not torch.equal(weights[name], wanted[name])]
    return found + left_over(run, keep)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a result, and of the adapter beside it, by file and name."""
    files = [path for part in ("model", "adapter") for path in (run / part).glob("*.safetensors")]
    return {f"{path.name}: {name}": tensor for path in files for name, tensor in load_file(path).items()}


def left_over(run: Path, keep: int | None) -> list[str]:
    """What should not lie in the folder of a run that has ended."""
    found = [f"left: {path.relative_to(run)}" for path in run.rglob("*") if path.name.endswith(".tmp")]
    found += [f"left: {path.name}" for path in (run / "checkpoints").glob(".*")]
    names = [path.name for path in all_checkpoints(run / "checkpoints")]
    if keep is not None and len(names) != keep:
        found.append(f"{len(names)} checkpoints, not {keep}: {names}")
    if len(complete_checkpoints(run / "checkpoints")) != len(names):
        found.append(f"incomplete checkpoints among {names}")
    return found


def unequal_states(checkpoint: Path, straight: Path) -> list[str]:
    """Where two checkpoints differ: each tensor of weights and optimizer by its place, bit by bit."""
    names = {path.name for folder in (checkpoint, straight) for path in folder.glob("*.pt")}
    assert names, straight
    with torch.serialization.safe_globals(SAFE_CLASSES):
        pairs = {name: [torch.load(f / name, weights_only=True) for f in (checkpoint, straight)] for name in names}
    return [f"{name}{place}" for name, (ours, wanted) in pairs.items() for place in _unequal(ours, wanted, "")]


def _unequal(ours: Any, wanted: Any, place: str) -> list[str]:
    if isinstance(wanted, dict):
        if ours.keys() != wanted.keys():
            return [f"{place} has {ours.keys() ^ wanted.keys()}"]
        return [found for key in wanted for found in _unequal(ours[key], wanted[key], f"{place}.{key}")]
    if isinstance(wanted, list | tuple):
        if len(ours) != len(wanted):
            return [f"{place} has {len(ours)}, not {len(wanted)}"]
        pairs = enumerate(zip(ours, wanted, strict=True))
        return [found for i, (a, b) in pairs for found in _unequal(a, b, f"{place}.{i}")]
    if isinstance(wanted, torch.Tensor):
        return [] if torch.equal(ours, wanted) else [place]
    if hasattr(wanted, "__dict__"):
        return _unequal(vars(ours), vars(wanted), place)
    return [] if ours == wanted else [f"{place}: {ours!r}, not {wanted!r}"]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
