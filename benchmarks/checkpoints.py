"""Size and time of checkpoints, and where a start goes, for stage 1, LoRA and full training of configs/small.

Runs `scripts/train.py` for two steps, and again from the checkpoint of the first. Needs the parts and scenes of
scripts/quickstart.sh, and finished stage 1. Prints one JSON line.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FULL = "trainable.language_model={lr: 1.0e-4}"
_OF_A_PART = r"^ +(?:projector|language_model|vision_tower) +([\d,]+) +[\d,]+ "
"""Parameters, in the table at the start."""
RUNS: dict[str, tuple[str, list[str]]] = {
    "stage 1": ("stage1", []),
    "LoRA": ("stage2", ["eval=null"]),
    "full": ("stage2", ["eval=null", FULL]),
}


def train(config: str, overrides: list[str]) -> str:
    """What a run prints."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(ROOT / f"configs/small/{config}.yaml")]
    done = subprocess.run([*command, "--set", *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def start_of(printed: str) -> dict[str, float]:
    """Seconds by part, from `first step after 9.3 s: imports 5.1, ...`."""
    total, parts = re.search(r"first step after ([\d.]+) s: (.*)", printed).groups()
    shares = dict(part.rsplit(" ", 1) for part in parts.split(", "))
    return {"total": float(total), **{name: float(seconds) for name, seconds in shares.items()}}


def measure(config: str, overrides: list[str]) -> dict[str, object]:
    """One kind of training."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*overrides, f"output={folder}", "schedule.max_steps=2", "checkpoint.every=1", "checkpoint.keep=2"]
        printed = train(config, overrides)
        run_dir = next(path for path in Path(folder).iterdir() if not path.name.startswith("."))
        saved = re.findall(r"checkpoint of ([\d,.]+) MB saved in ([\d.]+) s", printed)
        n_parameters = sum(int(number.replace(",", "")) for number in re.findall(_OF_A_PART, printed, re.M))
        for leftover in ("model", "adapter", "checkpoints/step-00000002"):
            shutil.rmtree(run_dir / leftover, ignore_errors=True)
        again = train(config, overrides)
        return {
            "model_mb": round(n_parameters * 4 / 1e6, 1),
            "checkpoint_mb": float(saved[-1][0].replace(",", "")),
            "save_s": [float(seconds) for _, seconds in saved],
            "start": start_of(printed),
            "resume": start_of(again),
        }


def main() -> None:
    found = {name: measure(*run) for name, run in RUNS.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps({"device": device, **found}))


if __name__ == "__main__":
    main()
