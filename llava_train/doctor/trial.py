"""A training of one step, as `llava-train train` runs it: tiny random parts, two pictures, a temporary folder.

python -m llava_train.doctor.trial FOLDER
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from llava_train.doctor.findings import Finding, Level
from llava_train.doctor.processes import Ended, run_python
from llava_train.run_files import ERRORS_FOLDER, METRICS_FILE, read_records

TIMEOUT_S = 300.0
NAME = "doctor"
_COLOURS = ("red", "blue")
STAGE: dict[str, Any] = {
    "name": NAME,
    "model": {
        "language_model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        },
        "vision_tower": {
            "config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            }
        },
        "chat_template": "vicuna_v1",
    },
    "init_from": "random",
    "trainable": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}},
    "data": [{"path": "samples.json"}],
    "batch": {"size": 2, "max_tokens": 1024, "max_sample_tokens": 512},
    "schedule": {"max_steps": 1, "warmup": 0.0},
    "engine": {"zero": 2},
    "loader": {"workers": 0},
    "checkpoint": {"every": None},
    "logging": {"every": 1},
}


def try_step() -> Ended:
    """Trains one step in a process and a folder of their own; the folder is gone afterwards."""
    try:
        return _try_step()
    except OSError as error:  # no folder can be made, or written
        return Ended(1, f"error: {error}", 0.0)


def _try_step() -> Ended:
    with tempfile.TemporaryDirectory(prefix="llava-train-doctor-") as folder:
        ended = run_python("llava_train.doctor.trial", [folder], TIMEOUT_S, cwd=Path(folder))
        records = read_records(Path(folder) / "runs" / NAME / METRICS_FILE)
        loss = next((record["loss"] for record in records if "loss" in record), None)
        tracebacks = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).rglob(f"{ERRORS_FOLDER}/*"))]
    if ended.code != 0:
        return replace(ended, output="\n".join([ended.output, *tracebacks]))
    if loss is None or not math.isfinite(loss):
        return Ended(1, f"{ended.output}\nthe loss of the step is {loss}", ended.seconds)
    return ended


def trained(ended: Ended) -> Iterator[Finding]:
    """What became of the step."""
    if ended.code == 0:
        device = re.search(r"^doctor trains on (.*)$", ended.output, re.MULTILINE)
        start = re.search(r"first step after .*", ended.output)
        text = f"one step on {device[1] if device else 'this machine'} in {ended.seconds:.1f} s"
        yield Finding("training", Level.ok, f"{text} ({start[0]})" if start else text)
        return
    said = [line for line in ended.output.strip().splitlines() if line.strip()]
    errors = [number for number, line in enumerate(said) if line.startswith("error: ")]
    words = said[errors[-1] : errors[-1] + 2] if errors else said[-1:]  # what failed, and why or what to do
    text = f"one step failed ({ended.why}): {'; '.join(words) or 'without a word'}"
    mend = "read its whole output: llava-train doctor --json; an issue with that file helps, too"
    yield Finding("training", Level.broken, text, mend)


def write_stage(folder: Path) -> Path:
    """Writes a stage file, and the data that it names: two pictures, each of one colour, with a question."""
    from PIL import Image

    samples = []
    for colour in _COLOURS:
        Image.new("RGB", (28, 28), colour).save(folder / f"{colour}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": colour},
        ]
        samples.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    (folder / "stage.yaml").write_text(yaml.safe_dump(STAGE), encoding="utf-8")
    return folder / "stage.yaml"


def main(folder: Path) -> int:
    import torch

    from llava_train.cli import run

    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.get_device_capability() >= (8, 0)
    print(f"doctor trains on {torch.cuda.get_device_name() if on_gpu else 'the CPU'} in {'bf16' if bf16 else 'fp32'}")
    return run([write_stage(folder)], [f"engine.precision={'bf16' if bf16 else 'fp32'}"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
