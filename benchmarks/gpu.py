"""Everything that needs a CUDA device, in one command of under nine minutes on one H100: `bash benchmarks/gpu.sh`.

    python benchmarks/gpu.py --device cpu --shape tiny      # each part that can run, in a minute, to see that it does

Parts run one after another in a process of their own (`gpu_parts.py` has them). Where one fails, runs out of memory,
ends its process or takes longer than it may, that is noted, and the next one goes on, in a new process if need be.
Results are written after each part, to benchmarks/results/gpu-DEVICE-DATE.json and below $OUT too, where that is set.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_table import table
from machine import about_this

_START_S = 120.0
"""Most time for the imports of a process."""
_LEAST_S = 20.0
"""With less time left no process is started."""


@dataclass
class Wanted:
    """What to measure."""

    device: str
    shape: str | None
    parts: tuple[str, ...] | None
    """Beginnings of names; None for all."""


@dataclass
class Record:
    """What was found so far, and where it is written."""

    out: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    todo: list[str] | None = None
    """Names of the parts that are left; None before a process has told them."""

    def take(self, result: dict[str, Any]) -> None:
        """The result of the part that is first in `todo`."""
        assert self.todo
        name = self.todo.pop(0)
        self.parts[name] = result
        print(f"{name}: {result.get('error', 'done')} ({result.get('took_s', 0):.0f} s)", flush=True)
        for place in self.places():
            place.write_text(json.dumps({**self.about, "parts": self.parts}, indent=1) + "\n", encoding="utf-8")

    def places(self) -> list[Path]:
        words = "-".join(self.about["device"].replace(",", "").replace("/", "-").split())
        name = f"gpu-{words}-{self.about['date'][:10]}.json"
        places = [self.out or Path(__file__).parent / "results" / name]
        return places + ([Path(os.environ["OUT"]) / name] if os.environ.get("OUT") else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", help="measure every part on this shape in place of its own: tiny")
    parser.add_argument("--parts", nargs="+", help="only those whose names begin so")
    parser.add_argument("--budget", type=float, default=510.0, help="seconds for all parts")
    parser.add_argument("--out", type=Path, help="file of results; default: in benchmarks/results")
    arguments = parser.parse_args()
    wanted = Wanted(arguments.device, arguments.shape, tuple(arguments.parts) if arguments.parts else None)
    record = Record(arguments.out)
    supervise(wanted, record, time.monotonic() + arguments.budget)
    print(table(record.about, record.parts), flush=True)
    print(f"results: {', '.join(map(str, record.places()))}")


def supervise(wanted: Wanted, record: Record, deadline: float) -> None:
    """Runs the parts in other processes, until there are none left or no time is.

    Raises:
        SystemExit: a process ended before it could say what there is to do.
    """
    context = multiprocessing.get_context("spawn")
    while (record.todo is None or record.todo) and deadline - time.monotonic() > _LEAST_S:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, wanted, record.todo, record.parts))
        process.start()
        theirs.close()
        problem = _listen(ours, record, deadline)
        if problem == "ended":
            process.join()
            problem = f"its process ended with {process.exitcode}"
        process.kill()
        process.join()
        if record.todo is None:
            raise SystemExit(f"no part was begun: {problem}")
        if problem and record.todo:
            record.take({"error": problem})
    for _ in list(record.todo or []):
        record.take({"error": "no time left"})


def _listen(pipe: Connection, record: Record, deadline: float) -> str | None:
    """Takes the results of a process until all are there or it asks to be replaced; else says what is wrong."""
    limit = _START_S
    while record.todo is None or record.todo:
        if not pipe.poll(max(0.0, min(limit, deadline - time.monotonic()))):
            return f"took longer than {min(limit, 999):.0f} s" if time.monotonic() < deadline else "no time left"
        try:
            kind, value = pipe.recv()
        except EOFError:
            return "ended"
        if kind == "replace":
            return None
        if kind == "plan":
            record.todo, record.about = value
        elif kind == "begins":
            limit = value
        else:
            record.take(value)
            limit = _LEAST_S
    return None


def work(pipe: Connection, wanted: Wanted, names: list[str] | None, results: dict[str, dict[str, Any]]) -> None:
    """Runs parts one after another and sends what each finds. In a process of its own."""
    import torch
    from gpu_parts import PARTS, Bench

    from llava_train.train.world import start_distributed

    if wanted.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu --shape tiny runs what can run without one")
    parts = {part.name: part for part in PARTS}
    if names is None:
        names = [
            part.name
            for part in PARTS
            if not (part.cuda_only and wanted.device == "cpu")
            and (wanted.parts is None or part.name.startswith(wanted.parts))
        ]
        pipe.send(("plan", (names, about_this(wanted.device))))
    bench = Bench(start_distributed(), wanted.shape, results)
    for name in names:
        pipe.send(("begins", parts[name].limit_s))
        started = time.perf_counter()
        torch.manual_seed(0)
        torch.compiler.reset()  # a layer may be compiled for so many models only, then it no longer is
        try:
            found = parts[name].run(bench)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500], "traceback": traceback.format_exc()[-3000:]}
        found["took_s"] = round(time.perf_counter() - started, 1)
        bench.results[name] = found
        pipe.send(("done", found))
        if not _usable(wanted.device):
            pipe.send(("replace", None))
            return


def _usable(device: str) -> bool:
    """Whether the next part may run in this process.

    A failed one can leave memory taken, or the device broken; liger changes the modules of transformers for all models.
    """
    import torch

    gc.collect()
    if "liger_kernel.transformers" in sys.modules:
        return False
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return torch.cuda.memory_allocated() < 2**30


if __name__ == "__main__":
    main()
