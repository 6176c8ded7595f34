"""llava_train itself: the real command on the workload's stage file, but that the result is not written."""

from __future__ import annotations

import json
import os

from harness import read_job

from llava_train.cli import run
from llava_train.train import stage


def main() -> None:
    job = read_job()
    stage.write_result = lambda *_: None  # the benchmark has no use for a model on disk
    overrides = [f"output={job.scratch}", *job.variant.split()]
    if code := run([job.workload / "stage.yaml"], overrides):
        raise SystemExit(code)
    lines = (job.scratch / "none" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = []
    for line, samples in zip(map(json.loads, lines), job.steps(), strict=True):
        n_tokens = sum(sample["n_tokens"] for sample in samples)
        assert line["n_supervised"] == sum(sample["n_supervised"] for sample in samples), "other samples than planned"
        steps.append(
            {
                "s": line["step_s"],
                "loss": line["loss"],
                "n_tokens": n_tokens,
                "n_supervised": line["n_supervised"],
                "n_computed": n_tokens,
            }
        )
    settings = {"packing": "exact-batch packs, no padding", "overrides": overrides[1:]}
    job.write(steps, settings, ["torch", "transformers", "deepspeed", "llava_train"])


if __name__ == "__main__":
    main()
    os._exit(0)  # DeepSpeed's and the loader's threads may linger
