"""From the command to the end of the first step, by part: what the run itself prints, over several starts.

    python benchmarks/startup.py                                  # the smoke recipe's stages and those of configs/small
    python benchmarks/startup.py --config configs/smoke/stage1.yaml --repeat 5

Needs the data of scripts/quickstart.sh for configs/small; what is not there is left out and named. Each start is a
process of its own, of one step, that begins from the parts (`init_from=random`). Files are in the page cache after the
first. `imports` is Python and every import before the processes join, `engine` DeepSpeed's start, `first step` all of
the first step; the modules that importing takes longest for are listed with their own milliseconds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import start_of
from machine import about_this

ROOT = Path(__file__).parents[1]
CONFIGS = ("smoke/stage1", "smoke/stage2", "small/stage1", "small/stage2")
_N_MODULES = 12


def start(config: Path, overrides: list[str]) -> dict[str, float]:
    """Seconds of one start by part, and of the whole command."""
    with tempfile.TemporaryDirectory() as output:
        keys = [f"output={output}", "init_from=random", "schedule.max_steps=1", "checkpoint.every=null", "eval=null"]
        command = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(config), "--set", *keys, *overrides]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        whole_s = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{config}: {done.stderr[-2000:]}")
    return {**start_of(done.stdout), "command": whole_s}


def starts(config: Path, overrides: list[str], repeat: int) -> dict[str, list[float]]:
    """Median and range of each part over `repeat` starts, after one that fills the page cache."""
    start(config, overrides)
    found = [start(config, overrides) for _ in range(repeat)]
    rows = {part: sorted(round(one.get(part, 0.0), 2) for one in found) for part in found[0]}
    return {part: [statistics.median(values), values[0], values[-1]] for part, values in rows.items()}


def slowest_imports() -> dict[str, float]:
    """Milliseconds that top packages take to import by themselves, their imports of others not counted."""
    code = "import llava_train.train.stage"
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stderr
    own: dict[str, float] = {}
    for micros, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", said):
        package = name.split(".")[0]
        own[package] = own.get(package, 0.0) + int(micros) / 1000
    return {name: round(own[name]) for name in sorted(own, key=lambda name: -own[name])[:_N_MODULES]}


def has_data(config: Path) -> bool:
    content: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    return all((ROOT / source["path"]).exists() for source in content["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[ROOT / f"configs/{name}.yaml" for name in CONFIGS])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file of results")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        **about_this("cuda" if torch.cuda.is_available() else "cpu"),
        "imports_ms": slowest_imports(),
        "starts_s": {},
    }
    for config in arguments.config:
        name = f"{config.parent.name}/{config.stem}"
        if not has_data(config):
            print(f"{name}: its data is not there; scripts/quickstart.sh makes it")
            continue
        found["starts_s"][name] = starts(config, arguments.overrides, arguments.repeat)
        parts = ", ".join(f"{part} {low}" for part, (low, *_) in found["starts_s"][name].items())
        print(f"{name}: {parts}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
