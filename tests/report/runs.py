"""Run folders as a run leaves them, without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from llava_train.files import write_manifest
from llava_train.report.read import RunRecord, read_run

HOSTILE = "<script>alert(1)</script> & 'quotes' \" <image>"
SINCE_THE_REPORT = (
    "time",
    "grad_norms",
    "forward_share",
    "backward_share",
    "evaluation_s",
    "checkpoint_s",
    "sample_lengths",
    "pack_fill",
)
"""Fields of metrics.jsonl that older runs lack."""


def config(**changes: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "batch": {"size": 8, "max_tokens": 2048, "max_sample_tokens": 640},
        "eval": {"every": 20, "metric": "vqa"},
        "about": {"torch": "2.13.0", "n_ranks": 2, "data": [{"path": "data.json", "n_samples": 99}]},
        **changes,
    }


def line(step: int, n_steps: int = 60, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl for a window of ten steps of two seconds."""
    loss = 4.0 - 3 * step / n_steps
    return {
        "step": step,
        "time": 1.79e9 + 2 * step,
        "loss": loss + 0.125,
        "grad_norm": 2.0,
        "grad_norms": {"projector": 1.0, "language_model": 1.5},
        "lr": {"projector": 1e-3, "language_model": 2e-5},
        "n_supervised": 50,
        "sources": {
            "captions": {"loss": loss - 0.5, "n_supervised": 300, "n_samples": 30},
            HOSTILE: {"loss": loss + 1.5, "n_supervised": 100, "n_samples": 50},
        },
        "n_bad": 3,
        "step_s": 2.0,
        "time_left_s": (n_steps - step) * 2.0,
        "samples_per_s": 4.0,
        "tokens_per_s": 1800.0,
        "text_tokens_per_s": 400.0,
        "images_per_s": 3.0,
        "padding_share": 0.0,
        "tflops_per_s": 440.0,
        "mfu": 0.445,
        "data_wait_s": 0.2,
        "data_wait_share": 0.1,
        "copy_share": 0.05,
        "forward_share": 0.25,
        "backward_share": 0.5,
        "optimizer_share": 0.05,
        "peak_memory_bytes": 61 << 30,
        "skipped_steps": 1,
        "evaluation_s": 5.0,
        "checkpoint_s": 1.5,
        "sample_lengths": [0, 60, 20] + [0] * 29,
        "pack_fill": [0] * 8 + [2, 8],
        **changes,
    }


def evaluation(step: int, **changes: Any) -> dict[str, Any]:
    score = 0.2 + step / 100
    interval = {"eval_vqa_low": score - 0.1, "eval_vqa_high": score + 0.1}
    return {"step": step, "eval_loss": 4.5 - step / 20, "eval_n_bad": 0, "eval_vqa": score, **interval, **changes}


def answer(step: int, id_: str = "q1", **changes: Any) -> dict[str, Any]:
    known = {"prompt": "<image>\nWhat colour?", "expected": "Red", "pictures": [f"pictures/{id_}.jpg"]}
    return {"step": step, "id": id_, "answer": "red" if step else HOSTILE, **known, **changes}


def write_run(
    folder: Path,
    metrics: Sequence[dict[str, Any]] | None = None,
    answers: Sequence[dict[str, Any]] | None = None,
    complete: bool = False,
    **changes: Any,
) -> Path:
    """A run of 60 steps with everything that a run can leave; `changes` are of its config."""
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (400, 300), "red").save(folder / "pictures/q1.jpg")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**{"name": folder.name, **changes})), encoding="utf-8")
    if metrics is None:
        metrics = [evaluation(0), *(line(step) for step in range(10, 61, 10)), evaluation(30), evaluation(60)]
    if answers is None:
        answers = [answer(0), answer(30), answer(60), answer(60, HOSTILE, prompt=HOSTILE)]
    lost = {"source": "data.json", "index": 7, "line": 8, "kind": "image_missing", "reason": HOSTILE}
    bad = {"step": 30, "loss": None, "grad_norm": 3.5, "samples": [{"source": "data.json", "id": HOSTILE}]}
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "answers.jsonl", answers)
    write_lines(folder / "quarantine.jsonl", [{"step": n, "id": f"lost-{n}", **lost} for n in range(1, 6)])
    write_lines(folder / "bad_steps.jsonl", [bad])
    if complete:
        (folder / "model").mkdir()
        write_manifest(folder / "model")
    return folder


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


def record(folder: Path, *arguments: Any, **changes: Any) -> RunRecord:
    return read_run(write_run(folder, *arguments, **changes))
