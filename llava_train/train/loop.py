"""The training loop.

An optimizer step is defined by its samples. Its loss is the sum of the cross entropy over the step's
supervised tokens, divided by their number, over all ranks and micro-steps. DeepSpeed averages gradients over
ranks, so each rank backpropagates `n_ranks * its sum / the number of all`, and the accumulation scaling of
DeepSpeed stays off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import deepspeed
import torch

from llava_train.config import StageConfig
from llava_train.data.loader import PackedBatch, StepBatch
from llava_train.errors import UserError
from llava_train.train.engine import World, optimizer_step
from llava_train.train.schedule import lr_factor, step_seed
from llava_train.train.tracking import QUARANTINE_FILE, Metrics, Tracker, quarantine_summary

_FEW_SAMPLES = 1000
"""One bad sample in the first batch is not yet a share: of so many samples, or of the whole run, it must be one."""


class BadSampleError(UserError):
    """A sample cannot be trained on, and the stage file says to stop then."""


class TooManyBadError(BadSampleError):
    """More samples cannot be trained on than the stage file allows."""

    def __init__(self, n_bad: int, step: int, config: StageConfig) -> None:
        path = config.run_dir / QUARANTINE_FILE
        super().__init__(
            f"max_bad_share: {n_bad} samples of the first {step} steps ({step * config.batch.size} samples) were left "
            f"out, more than {config.max_bad_share:.1%}: "
            f"{quarantine_summary(path)}. {path} has them all, and `llava-train check` looks through the data "
            "before a run; mend the data, or raise max_bad_share"
        )


def train(
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    config: StageConfig,
    batches: Iterable[StepBatch],
    n_steps: int,
    tracker: Tracker,
    source_names: tuple[str, ...],
    after_step: Callable[[int], None],
) -> None:
    """Trains on each batch in turn. `after_step(steps done)` is called after every optimizer step.

    Raises:
        BadSampleError: a sample cannot be trained on, or too many, as the stage file says.
    """
    window = Window(source_names, n_bad=tracker.n_bad_before)
    asked = time.perf_counter()
    for batch in batches:
        window.data_wait_s += time.perf_counter() - asked
        refuse_bad(batch, config)
        tracker.quarantine(batch.bad_samples)
        set_learning_rate(engine, lr_factor(batch.step, n_steps, config.schedule))
        torch.manual_seed(step_seed(config.seed, batch.step, world.rank))
        window.add(batch, world, *train_step(engine, world, batch))
        step = batch.step + 1
        if step % config.logging.every == 0 or step in (1, n_steps):
            metrics = window.metrics(engine, world, step, n_steps)
            tracker.step(step, metrics)
            if too_many_bad(metrics["n_bad"], step, n_steps, config):
                raise TooManyBadError(metrics["n_bad"], step, config)
            window = Window(source_names, n_bad=window.n_bad)
        else:
            tracker.step(step)
        asked = time.perf_counter()
        after_step(step)
        window.started += time.perf_counter() - asked  # evaluation and checkpoints are not training time
        asked = time.perf_counter()


def too_many_bad(n_bad: int, step: int, n_steps: int, config: StageConfig) -> bool:
    """Whether the samples left out in the first `step` steps are more than the stage file allows."""
    n_seen, n_all = step * config.batch.size, n_steps * config.batch.size
    return n_bad > config.max_bad_share * max(n_seen, min(n_all, _FEW_SAMPLES))


def train_step(
    engine: deepspeed.DeepSpeedEngine, world: World, batch: StepBatch
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """One optimizer step.

    Returns:
        float64 [sources, 2] on the device: this rank's summed cross entropy and number of supervised tokens by
        source; and the norm of the whole gradient before clipping. Nothing of ours waits for the device here.
    """
    own_count = torch.full((), batch.n_supervised, dtype=torch.float64, device=world.device)  # a copy would wait
    count = own_count.clone()
    torch.distributed.all_reduce(count)
    scale = (world.n_ranks / count.clamp(min=1)).float()
    sums = torch.zeros(len(batch.n_samples), 2, dtype=torch.float64, device=world.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
        micro_batch = micro_batch.to(world.device)
        losses = forward(engine, micro_batch)
        engine.backward(losses.sum() * scale, scale_wrt_gas=False)
        counted = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1).double()
        sums.index_add_(0, micro_batch.sources, counted)
    return sums, optimizer_step(engine)


def forward(engine: deepspeed.DeepSpeedEngine, batch: PackedBatch) -> torch.Tensor:
    """Cross entropy of each target of a pack, through the engine: float32 [S]. `batch` is on the device."""
    return engine(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        n_images=batch.n_images,
        cu_seqlens=batch.cu_seqlens,
        lengths=batch.lengths,
        predictors=batch.predictors,
        targets=batch.targets,
    )


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, factor: float) -> None:
    """Sets each group to its peak learning rate times `factor`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def refuse_bad(batch: StepBatch, config: StageConfig) -> None:
    """Stops at a bad sample, if the stage file says so. Raises BadSampleError."""
    for bad in batch.bad_samples:
        key, policy = (
            ("batch.over_long", config.batch.over_long) if bad.over_long else ("on_bad_sample", config.on_bad_sample)
        )
        if policy == "error":
            remedy = "drop or truncate" if bad.over_long else "skip"
            error = BadSampleError(
                f"{bad.source}: sample {bad.id!r} ({bad.place}): {bad.reason}. Mend it, or set {key}: "
                f"{remedy} to go on without it"
            )
            error.on_every_rank = bad.on_every_rank
            raise error


@dataclass
class Window:
    """Sums over the steps since the last logged one."""

    source_names: tuple[str, ...]
    started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0
    n_steps: int = 0
    n_samples: list[int] = field(init=False)
    """By source, over all ranks."""
    n_tokens: int = 0
    n_images: int = 0
    n_bad: int = 0
    """Samples left out since the run began, those that this rank reports."""
    by_source: torch.Tensor | None = None
    last: tuple[torch.Tensor, torch.Tensor | float] | None = None

    def __post_init__(self) -> None:
        self.n_samples = [0] * len(self.source_names)

    def add(self, batch: StepBatch, world: World, sums: torch.Tensor, norm: torch.Tensor | float) -> None:
        self.n_steps += 1
        self.n_samples = [total + n for total, n in zip(self.n_samples, batch.n_samples, strict=True)]
        self.n_tokens += batch.n_tokens
        self.n_images += batch.n_images
        self.n_bad += sum(world.is_main or not bad.on_every_rank for bad in batch.bad_samples)
        self.by_source = sums if self.by_source is None else self.by_source + sums
        self.last = sums, norm

    def metrics(self, engine: deepspeed.DeepSpeedEngine, world: World, step: int, n_steps: int) -> Metrics:
        """The logged line, on every rank: loss and gradient norm of the last step, sources and rates of the window."""
        assert self.last is not None and self.by_source is not None
        sums, norm = self.last
        of_ranks = torch.tensor([self.n_tokens, self.n_images, self.data_wait_s, self.n_bad], dtype=torch.float64)
        totals = torch.cat([sums.sum(dim=0), of_ranks.to(world.device), self.by_source.flatten()])
        torch.distributed.all_reduce(totals)
        loss_sum, n_supervised, n_tokens, n_images, data_wait_s, n_bad, *by_source = totals.tolist()
        elapsed_s = time.perf_counter() - self.started
        lr = {group["name"]: group["lr"] for group in engine.optimizer.param_groups if "decay" not in group["name"]}
        return {
            "step": step,
            "loss": loss_sum / max(n_supervised, 1.0),
            "grad_norm": float(norm),
            "lr": lr,
            "n_supervised": int(n_supervised),
            "sources": self._of_sources(by_source),
            "n_bad": int(n_bad),
            "step_s": elapsed_s / self.n_steps,
            "data_wait_s": data_wait_s / world.n_ranks / self.n_steps,
            "samples_per_s": sum(self.n_samples) / elapsed_s,
            "tokens_per_s": n_tokens / elapsed_s,
            "images_per_s": n_images / elapsed_s,
            "time_left_s": (n_steps - step) * elapsed_s / self.n_steps,
            "skipped_steps": engine.skipped_steps,
        }

    def _of_sources(self, by_source: Sequence[float]) -> dict[str, Metrics]:
        """Mean loss, supervised tokens and samples of each source that had any."""
        each = zip(self.source_names, by_source[::2], by_source[1::2], self.n_samples, strict=True)
        return {
            name: {"loss": loss_sum / max(count, 1.0), "n_supervised": int(count), "n_samples": n_samples}
            for name, loss_sum, count, n_samples in each
            if n_samples
        }
