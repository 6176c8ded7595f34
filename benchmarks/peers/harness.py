"""What the runs of all peers share. Each peer is run in an environment of its own by

    python run_NAME.py JOB.json

where JOB.json holds {"workload": folder, "device": "cpu" | "cuda", "variant": text, "scratch": folder, "result": file}
and `result` becomes {"versions", "settings", "steps": [{"s", "loss", ...}], "peak_cuda_bytes"}. Nothing here needs more
than Python 3.10 and, to observe, torch and transformers of any age.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


WORKERS = {"cpu": 1, "cuda": 4}
"""Processes that prepare data, alike for all."""


@dataclass
class Job:
    """One run of one peer."""

    workload: Path
    device: str
    variant: str
    scratch: Path
    result: Path
    content: dict[str, Any] = field(init=False)
    """What `workload.json` holds."""

    def __post_init__(self) -> None:
        self.content = json.loads((self.workload / "workload.json").read_text(encoding="utf-8"))

    @property
    def samples(self) -> list[dict[str, Any]]:
        return self.content["samples"]

    def steps(self) -> list[list[dict[str, Any]]]:
        """The samples of each optimizer step."""
        size = self.content["batch_size"]
        return [self.samples[start : start + size] for start in range(0, len(self.samples), size)]

    def sorted_in_steps(self) -> list[dict[str, Any]]:
        """The samples, of each step the longest first: micro-batches of like lengths, and the same steps."""
        return [s for step in self.steps() for s in sorted(step, key=lambda s: -s["n_tokens"])]

    def learning_rate(self) -> float:
        """One for all parts: that is what most peers have."""
        rates = {part["lr"] for part in self.content["trainable"].values()}
        assert len(rates) == 1, f"parts of different learning rates: {rates}"
        return rates.pop()

    def write(self, steps: list[dict[str, Any]], settings: dict[str, Any], packages: list[str]) -> None:
        found = {"versions": versions(packages), "settings": settings, "steps": steps, "peak_cuda_bytes": None}
        found["lacks"] = lacks(self.device)
        if self.device == "cuda":
            import torch

            found["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self.result.write_text(json.dumps(found, default=str), encoding="utf-8")


def read_job() -> Job:
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    paths = {key: Path(given[key]) for key in ("workload", "scratch", "result")}
    return Job(device=given["device"], variant=given["variant"], **paths)


def has(module: str) -> bool:
    return find_spec(module) is not None


def lacks(device: str) -> list[str]:
    """What a trainer would be faster with, and its environment has not."""
    return [] if device == "cpu" or has("flash_attn") else ["flash-attn"]


def weights_and_autocast(bf16: bool, device: str, lora: bool, amp: bool) -> tuple[bool, bool]:
    """Whether TRL's weights are in bfloat16, and whether it computes under autocast to it.

    On a GPU adapters need autocast: peft keeps them in float32 beside weights in bfloat16.
    """
    return bf16 and not amp, bf16 and (amp or (lora and device == "cuda"))


def versions(packages: list[str]) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class StepClock:
    """Seconds from the end of one step on the device to the end of the next; logging falls into the next."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._last = time.perf_counter()

    def step_ended(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        last, self._last = self._last, time.perf_counter()
        return self._last - last


class Observer:
    """Times the optimizer steps of a transformers Trainer and counts what they train on."""

    def __init__(self, device: str, tokens_of_image: int = 1) -> None:
        self.tokens_of_image, self._clock = tokens_of_image, StepClock(device)
        self.steps: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self._seen: list[dict[str, Any]] = []

    def saw(self, inputs: dict[str, Any]) -> None:
        """Counts a micro-batch; the counts stay on the device."""
        import torch

        mask, ids, labels = inputs.get("attention_mask"), inputs["input_ids"], inputs["labels"]
        if mask is None:
            real = torch.ones_like(ids)
        elif mask.dim() == 4:  # additive: 0 where a token sees itself
            real = mask[:, 0].diagonal(dim1=-2, dim2=-1) == 0
        else:
            real = mask != 0
        lengths = real.sum(dim=1)
        n_computed = ids.numel()
        if self.tokens_of_image > 1:  # of the original LLaVA's mark of an image, -200, the model makes so many
            lengths = lengths + (ids == -200).sum(dim=1) * (self.tokens_of_image - 1)
            n_computed = lengths.max() * len(ids)
        n_supervised = (labels[:, 1:] != -100).sum()
        self._seen.append({"n_tokens": lengths.sum(), "n_supervised": n_supervised, "n_computed": n_computed})

    def step_ended(self) -> None:
        step_s = self._clock.step_ended()
        counts = {key: int(sum(seen[key] for seen in self._seen)) for key in self._seen[0]}
        self.steps.append({"s": step_s, "n_micro_batches": len(self._seen), **counts})
        self._seen = []

    def with_losses(self) -> list[dict[str, Any]]:
        assert len(self.losses) == len(self.steps), f"{len(self.losses)} losses of {len(self.steps)} steps"
        return [{**step, "loss": loss} for step, loss in zip(self.steps, self.losses, strict=True)]


def observe(device: str, tokens_of_image: int = 1) -> tuple[Observer, Any]:
    """An observer, and the callback to give to the Trainer. Every Trainer of this process is observed."""
    import transformers

    observer = Observer(device, tokens_of_image)
    training_step = transformers.Trainer.training_step

    def observed(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        observer.saw(inputs)
        return training_step(self, model, inputs, *args, **kwargs)

    transformers.Trainer.training_step = observed

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observer.step_ended()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                observer.losses.append(float(logs["loss"]))

    return observer, Ends()


def common_arguments(job: Job, micro_batch: int) -> dict[str, Any]:
    """What every transformers Trainer is told alike: the optimizer, its steps, and no work beside training."""
    return {
        "output_dir": str(job.scratch),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.content["batch_size"] // micro_batch,
        "max_steps": job.content["n_steps"],
        "learning_rate": job.learning_rate(),
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": WORKERS[job.device],
        "seed": 0,
        "use_cpu": job.device == "cpu",
    }
