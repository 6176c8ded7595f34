"""Small data sets and stage files, and the processes that train on them."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"
TIMEOUT_S = 1200
"""Bound of every wait for a process: so long that only one that hangs reaches it."""
START_METHOD = multiprocessing.get_start_method()
_looking = threading.Lock()
"""Of two threads that look at a process together, one may miss its exit code."""


def write_samples(path: Path, kinds: str, seed: int = 0) -> Path:
    """Writes a LLaVA JSON file with one sample a letter, and its images.

    `i` one image, `m` two images, `t` text only, `x` an image that is missing, `b` an image file that is no
    image, `r` a record whose roles are out of order, `l` a text of 400 bytes more than the others.
    """
    rng = random.Random(seed)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([_record(path, i, kind, rng) for i, kind in enumerate(kinds)]), encoding="utf-8")
    return path


def _record(path: Path, number: int, kind: str, rng: random.Random) -> dict[str, Any]:
    n_images = {"i": 1, "m": 2, "x": 1, "b": 1}.get(kind, 0)
    turns = []
    for turn in range(rng.randint(1, 3)):
        marks = "<image>\n" * n_images if turn == 0 else ""
        turns.append({"from": "human", "value": marks + "what " * rng.randint(1, 5) + "?"})
        turns.append({"from": "gpt", "value": rng.choice("abcdef") * rng.randint(1, 12) + "."})
    if kind == "l":
        turns[-1]["value"] += " long" * 80
    if kind == "r":
        turns.reverse()
    record: dict[str, Any] = {"id": f"{path.stem}-{number}-{kind}", "conversations": turns}
    names = [f"images/{path.stem}-{number}-{i}.png" for i in range(n_images)]
    for name in names:
        file = path.parent / name
        if kind == "b":
            file.write_bytes(b"\x89PNG no picture")
        elif kind != "x":
            size = (rng.randint(20, 40), rng.randint(20, 40))
            Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(file)
    if names:
        record["image"] = names if len(names) > 1 else names[0]
    return record


def stage_content(**changes: Any) -> dict[str, Any]:
    """The content of a stage file: the smoke recipe's stage 2, without evaluation, on `data.json`."""
    content = yaml.safe_load((ROOT / "configs/smoke/stage2.yaml").read_text(encoding="utf-8"))
    del content["eval"]
    content["model"]["chat_template"] = "chatml"
    content |= {
        "name": "tiny",
        "init_from": "random",
        "data": [{"path": "data.json"}],
        "batch": {"size": 4, "max_tokens": 1024, "max_sample_tokens": 1024},
        "engine": {"zero": 0, "precision": "fp32"},
        "schedule": {"epochs": 1},
        "loader": {"workers": 0},
        "checkpoint": {"every": None},
    }
    return {**content, **changes}


def write_stage(path: Path, **changes: Any) -> Path:
    """Writes `stage_content(**changes)`; the run is named like the file."""
    path.write_text(yaml.safe_dump(stage_content(**{"name": path.stem, **changes})), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class Clock:
    """In place of the module `time`: a clock that stands still until somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def perf_counter(self) -> float:
        return self.now_s

    monotonic = time = perf_counter


@dataclass
class Finished:
    """Processes of a run that have ended: exit code, standard output and error of each rank."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]

    def check(self) -> Finished:
        assert not any(self.codes), f"{self.codes}\n{self.stdout[0][-2000:]}\n" + "\n".join(
            text[-4000:] for text in self.stderr
        )
        return self


def environment(**more: str) -> dict[str, str]:
    """This process's environment, as a launcher would hand it to a rank on a machine without a hub."""
    of_launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in of_launchers}
    defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return {**kept, **defaults, **more}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(arguments: list[Any], cwd: Path, n_ranks: int = 1, said: Path | None = None) -> list[BaseProcess]:
    """Starts `python ARGUMENTS` once a rank, each the leader of a process group of its own.

    Imports take ten times as long as a tiny run, so the ranks are forked from a process that has made them (`imported`).

    Args:
        said: a folder for what the ranks print, by default `cwd`.
    """
    port = str(free_port())
    started = []
    for rank in range(n_ranks):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_ranks)}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **places)
        outputs = tuple((said or cwd) / f"{name}-{rank}" for name in ("stdout", "stderr"))
        with _looking:
            process = importer().Process(target=_become, args=([str(part) for part in arguments], cwd, env, outputs))
            process.start()
        started.append(process)
    return started


@cache
def importer() -> ForkServerContext:
    """Forks processes that have imported what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.imported"])
    no_threads = {"TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # forks lose them
    with mock.patch.dict(os.environ, environment(**no_threads)):
        first = context.Process()
        first.start()
    first.join()
    return context


def _become(arguments: list[str], cwd: Path, env: dict[str, str], outputs: tuple[Path, Path]) -> None:
    """Makes this forked process `python ARGUMENTS`."""
    os.setsid()
    multiprocessing.set_start_method(START_METHOD, force=True)  # it would hand on its own to the workers of loaders
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def wait(processes: list[BaseProcess], said: Path, timeout_s: float = TIMEOUT_S, grace_s: float = 120.0) -> Finished:
    """Waits for the ranks. When one fails, the others get `grace_s`, as under a launcher."""
    deadline, failed = time.monotonic() + timeout_s, False
    while None in (codes := _codes(processes)) and time.monotonic() < deadline:
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + grace_s)
        time.sleep(0.01)
    return ended(processes, said)


def _codes(processes: list[BaseProcess]) -> list[int | None]:
    with _looking:
        return [process.exitcode for process in processes]


def ended(processes: list[BaseProcess], said: Path) -> Finished:
    """What the ranks have left. Those that still run are killed, with their children."""
    for process, code in zip(processes, _codes(processes), strict=True):
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
    while None in (codes := _codes(processes)):
        time.sleep(0.01)
    ranks = range(len(processes))
    read = [[(said / f"{name}-{rank}").read_text() for rank in ranks] for name in ("stdout", "stderr")]
    return Finished(codes, *read)


def run_ranks(arguments: list[Any], cwd: Path, n_ranks: int = 1) -> Finished:
    """Runs `python ARGUMENTS` on each of `n_ranks` ranks to the end."""
    return wait(start_ranks(arguments, cwd, n_ranks), cwd)


@dataclass
class Outcome:
    """What one command of `run_many` did on one rank."""

    code: int
    stdout: str
    stderr: str


def run_many(
    commands: dict[str, list[Any]], cwd: Path, n_ranks: int = 1, worker: str = "tests.train.run_many"
) -> dict[str, list[Outcome]]:
    """Runs `scripts/train.py ARGUMENTS` for each command, one after another in the same processes.

    Starting a process takes longer than a small run. Returns the outcomes of each command by rank.
    """
    spec = {name: [str(argument) for argument in arguments] for name, arguments in commands.items()}
    (cwd / "commands.json").write_text(json.dumps(spec))
    run_ranks(["-m", worker, cwd / "commands.json"], cwd, n_ranks).check()
    ranks = [json.loads((cwd / f"outcomes-{rank}.json").read_text()) for rank in range(n_ranks)]
    return {name: [Outcome(**outcomes[name]) for outcomes in ranks] for name in commands}
