"""The names under which trackers show what a line of metrics.jsonl holds: `train/loss`, `speed/mfu`, ...

The same in TensorBoard and wandb, which make a section of what stands before the first stroke. docs/metrics.md lists
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_SECTIONS = {
    "train": ("loss", "grad_norm", "n_supervised", "n_bad", "skipped_steps"),
    "speed": (
        "step_s",
        "samples_per_s",
        "tokens_per_s",
        "text_tokens_per_s",
        "images_per_s",
        "padding_share",
        "tflops_per_s",
        "mfu",
    ),
    "time": (
        "data_wait_share",
        "copy_share",
        "forward_share",
        "backward_share",
        "optimizer_share",
        "evaluation_s",
        "checkpoint_s",
    ),
    "memory": ("peak_memory_bytes",),
}


def curves(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; what is null or not finite has none."""
    named = {name: float(value) for name, value in _named(metrics) if value is not None}
    return {name: value for name, value in named.items() if math.isfinite(value)}


def _named(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for section, keys in _SECTIONS.items():
        yield from ((f"{section}/{key}", metrics[key]) for key in keys if key in metrics)
    for part, norm in metrics.get("grad_norms", {}).items():
        yield f"train/grad_norm/{part}", norm
    for part, lr in metrics.get("lr", {}).items():
        yield f"train/lr/{part}", lr
    for source, of_source in metrics.get("sources", {}).items():
        yield f"loss_by_source/{source}", of_source["loss"]
        yield f"samples_by_source/{source}", of_source["n_samples"]
    for key, value in metrics.items():
        if key.startswith("eval_"):
            yield f"eval/{key.removeprefix('eval_')}", value
