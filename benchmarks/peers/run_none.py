"""llava_train itself: the real command on the workload's stage file, but that the result is not written."""

from __future__ import annotations

import json
import os
from typing import Any

import harness

from llava_train.cli import run
from llava_train.train import loop, stage


def main() -> None:
    job = harness.read_job()
    stage.write_result = lambda *_: None  # the benchmark has no use for a model on disk
    seconds = time_steps(job.device)
    overrides = [f"output={job.scratch}", f"loader.workers={harness.WORKERS[job.device]}", *job.variant.split()]
    if code := run([job.workload / "stage.yaml"], overrides):
        raise SystemExit(code)
    lines = (job.scratch / "none" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = []
    for line, step_s, samples in zip(map(json.loads, lines), seconds, job.steps(), strict=True):
        n_tokens = sum(sample["n_tokens"] for sample in samples)
        assert line["n_supervised"] == sum(sample["n_supervised"] for sample in samples), "other samples than planned"
        steps.append(
            {
                "s": step_s,
                "loss": line["loss"],
                "n_tokens": n_tokens,
                "n_supervised": line["n_supervised"],
                "n_computed": n_tokens,
            }
        )
    settings = {"packing": "exact-batch packs, no padding", "overrides": overrides[1:]}
    job.write(steps, settings, ["torch", "transformers", "deepspeed", "llava_train"])


def time_steps(device: str) -> list[float]:
    """A list that gets the seconds from the end of a step to the end of the next, its line in the log among them.

    So are a Trainer's: `step_s` of the log ends before the line is written.
    """
    clock, train_step, seconds = harness.StepClock(device), loop.train_step, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        seconds.append(clock.step_ended())
        return result

    loop.train_step = timed
    return seconds


if __name__ == "__main__":
    main()
    os._exit(0)  # DeepSpeed's and the loader's threads may linger
