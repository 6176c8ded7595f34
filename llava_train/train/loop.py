"""The training loop.

An optimizer step is defined by its samples. Its loss is the sum of the cross entropy over the step's
supervised tokens, divided by their number, over all ranks and micro-steps. DeepSpeed averages gradients over
ranks, so each rank backpropagates `n_ranks * its sum / the number of all`, and the accumulation scaling of
DeepSpeed stays off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import deepspeed
import torch

from llava_train.config import StageConfig
from llava_train.data.loader import PackedBatch, StepBatch
from llava_train.errors import UserError
from llava_train.train.engine import World, optimizer_step
from llava_train.train.schedule import lr_factor, step_seed
from llava_train.train.tracking import Metrics, Tracker


class BadSampleError(UserError):
    """A sample cannot be trained on, and the stage file says to stop then."""


def train(
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    config: StageConfig,
    batches: Iterable[StepBatch],
    n_steps: int,
    tracker: Tracker,
    after_step: Callable[[int], None],
) -> None:
    """Trains on each batch in turn. `after_step(steps done)` is called after every optimizer step."""
    window = Window()
    asked = time.perf_counter()
    for batch in batches:
        window.data_wait_s += time.perf_counter() - asked
        refuse_or_quarantine(batch, config, tracker)
        set_learning_rate(engine, lr_factor(batch.step, n_steps, config.schedule))
        torch.manual_seed(step_seed(config.seed, batch.step, world.rank))
        window.add(batch, *train_step(engine, world, batch))
        step = batch.step + 1
        if step % config.logging.every == 0 or step in (1, n_steps):
            tracker.step(step, window.metrics(engine, world, step, n_steps))
            window = Window()
        else:
            tracker.step(step)
        asked = time.perf_counter()
        after_step(step)
        window.started += time.perf_counter() - asked  # evaluation and checkpoints are not training time
        asked = time.perf_counter()


def train_step(
    engine: deepspeed.DeepSpeedEngine, world: World, batch: StepBatch
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """One optimizer step.

    Returns:
        float64 [2] on the device: this rank's summed cross entropy and number of supervised tokens; and the
        norm of the whole gradient before clipping. Nothing of ours waits for the device here.
    """
    own_count = torch.full((), batch.n_supervised, dtype=torch.float64, device=world.device)  # a copy would wait
    count = own_count.clone()
    torch.distributed.all_reduce(count)
    scale = (world.n_ranks / count.clamp(min=1)).float()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
        loss_sum = forward(engine, micro_batch, world)
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        total += loss_sum.detach()
    norm = optimizer_step(engine)
    return torch.stack([total, own_count]), norm


def forward(engine: deepspeed.DeepSpeedEngine, batch: PackedBatch, world: World) -> torch.Tensor:
    """Summed cross entropy of a pack, through the engine."""
    batch = batch.to(world.device)
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


def refuse_or_quarantine(batch: StepBatch, config: StageConfig, tracker: Tracker) -> None:
    """Stops at a bad sample or records it, as the stage file says. Raises BadSampleError."""
    for bad in batch.bad_samples:
        key, policy = (
            ("batch.over_long", config.batch.over_long) if bad.over_long else ("on_bad_sample", config.on_bad_sample)
        )
        if policy == "error":
            remedy = "drop or truncate" if bad.over_long else "skip"
            error = BadSampleError(
                f"{bad.source}: sample {bad.id!r} (number {bad.index}): {bad.reason}. Mend it, or set {key}: "
                f"{remedy} to go on without it"
            )
            error.on_every_rank = bad.on_every_rank
            raise error
    tracker.quarantine(batch.bad_samples)


@dataclass
class Window:
    """Sums over the steps since the last logged one."""

    started: float = field(default_factory=time.perf_counter)
    data_wait_s: float = 0.0
    n_steps: int = 0
    n_samples: int = 0
    n_tokens: int = 0
    n_images: int = 0
    last: tuple[torch.Tensor, torch.Tensor | float] | None = None

    def add(self, batch: StepBatch, sums: torch.Tensor, norm: torch.Tensor | float) -> None:
        self.n_steps += 1
        self.n_samples += batch.n_samples
        self.n_tokens += batch.n_tokens
        self.n_images += batch.n_images
        self.last = sums, norm

    def metrics(self, engine: deepspeed.DeepSpeedEngine, world: World, step: int, n_steps: int) -> Metrics:
        """The logged line: loss and gradient norm of the last step, rates over the window. On every rank."""
        assert self.last is not None
        sums, norm = self.last
        of_ranks = torch.tensor([self.n_tokens, self.n_images, self.data_wait_s], dtype=torch.float64)
        totals = torch.cat([sums, of_ranks.to(world.device)])
        torch.distributed.all_reduce(totals)
        loss_sum, n_supervised, n_tokens, n_images, data_wait_s = totals.tolist()
        elapsed_s = time.perf_counter() - self.started
        lr = {group["name"]: group["lr"] for group in engine.optimizer.param_groups if "decay" not in group["name"]}
        return {
            "step": step,
            "loss": loss_sum / max(n_supervised, 1.0),
            "grad_norm": float(norm),
            "lr": lr,
            "n_supervised": int(n_supervised),
            "step_s": elapsed_s / self.n_steps,
            "data_wait_s": data_wait_s / world.n_ranks / self.n_steps,
            "samples_per_s": self.n_samples / elapsed_s,
            "tokens_per_s": n_tokens / elapsed_s,
            "images_per_s": n_images / elapsed_s,
            "time_left_s": (n_steps - step) * elapsed_s / self.n_steps,
            "skipped_steps": engine.skipped_steps,
        }
