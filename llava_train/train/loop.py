"""The training loop.

An optimizer step is defined by its samples. Its loss is the sum of the cross entropy over the step's
supervised tokens, divided by their number, over all ranks and micro-steps. DeepSpeed averages gradients over
ranks, so each rank backpropagates `n_ranks * its sum / the number of all`, and the accumulation scaling of
DeepSpeed stays off.

Between two steps, at the *border*, the ranks add up the step's supervised tokens and the requests to stop, in one
message between CPUs: all of them train on the step, or none does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

import deepspeed
import torch

from llava_train.config import StageConfig
from llava_train.data.loader import PackedBatch, StepBatch
from llava_train.errors import UserError
from llava_train.run_files import BAD_STEPS_FILE, QUARANTINE_FILE, quarantine_summary
from llava_train.train.checkpoint import Checkpoints
from llava_train.train.engine import optimizer_step
from llava_train.train.grad_norm import GradNorm
from llava_train.train.interrupt import Preempted
from llava_train.train.out_of_memory import noted
from llava_train.train.schedule import lr_factor, step_seed
from llava_train.train.session import Session
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.trackers import Metrics
from llava_train.train.tracking import Tracking
from llava_train.train.window import Window
from llava_train.train.world import World

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


class NothingTrainedError(BadSampleError):
    """No step had a supervised token, or none was taken: there is no result worth writing."""

    def __init__(self, n_bad: int, n_skipped: int, step: int, config: StageConfig) -> None:
        n_samples, path = step * config.batch.size, config.run_dir / QUARANTINE_FILE
        reasons = []
        if n_bad:
            reasons.append(f"{n_bad} samples were left out ({quarantine_summary(path)}; {path} has them all)")
        if n_skipped:
            bad_steps = config.run_dir / BAD_STEPS_FILE
            reasons.append(f"{n_skipped} steps had a loss or gradient that is not finite ({bad_steps} has them all)")
        if n_bad < n_samples and not n_skipped:
            reasons.append("no token of the others is supervised")
        super().__init__(
            f"nothing was trained in {step} steps ({n_samples} samples): {'; '.join(reasons)}. No result is written. "
            "`llava-train check` looks through the data before a run; fix the data, and start again under another name"
        )


class NotSavedError(UserError):
    """The run was asked to stop, and could not save: submitting it again at once would not help."""


class BadNumbersError(UserError):
    """Too many steps in a row whose loss or gradient is not finite."""


class Loop:
    """Trains on each batch in turn.

    Args:
        after_step: called with the number of steps done, after each.
    """

    def __init__(
        self,
        session: Session,
        config: StageConfig,
        engine: deepspeed.DeepSpeedEngine,
        n_steps: int,
        tracking: Tracking,
        window: Window,
        checkpoints: Checkpoints,
        after_step: Callable[[int], None],
    ) -> None:
        self.world, self.stop, self.config, self.engine = session.world, session.stop, config, engine
        self.clock = session.clock
        self.n_steps, self.tracking, self.window, self.checkpoints = n_steps, tracking, window, checkpoints
        self.after_step = after_step
        self.n_bad_in_row = 0
        self.owes_save = False

    def train(self, batches: Iterable[StepBatch]) -> None:
        """Trains on each batch in turn.

        Raises:
            BadSampleError: a sample cannot be trained on, or too many, as the stage file says.
            BadNumbersError, HarmedError: the loss, the gradient or the weights are not finite.
            Preempted: somebody asked to stop; the state is saved.
            NotSavedError: somebody asked to stop, and the state could not be saved.
        """
        self.window.restart()  # what came before, the dry run too, is not training time
        asked = time.perf_counter()
        self.world.beat("reading the first batch")
        for batch in batches:
            self.window.data_wait_s += time.perf_counter() - asked
            self.clock.mark("first batch")
            refuse_bad(batch, self.config)
            self.world.beat(f"meeting the other ranks before step {batch.step + 1}")
            n_supervised = self._meet_at_border(batch)
            self.world.beat(f"forward and backward of step {batch.step + 1}")
            self.tracking.quarantine(batch.bad_samples)
            set_learning_rate(self.engine, lr_factor(batch.step, self.n_steps, self.config.schedule))
            torch.manual_seed(step_seed(self.config.seed, batch.step, self.world.rank))
            with noted(f"step {batch.step + 1}", *batch.micro_batches):
                sums, norm, taken = train_step(self.engine, self.world, batch, n_supervised, self.window.watch)
            self.clock.mark("first step")
            if line := self.clock.line():
                self.tracking.say(line)
            self.window.add(batch, self.world, sums, norm, taken)
            self.window.n_trained += n_supervised * taken
            metrics = self._log(batch.step + 1)
            self._count_bad(batch, sums, norm, taken)
            self._refuse_untrained(metrics)
            self.world.beat(f"what follows step {batch.step + 1}")
            with self.window.paused("evaluation"):
                self.after_step(batch.step + 1)
            with self.window.paused("checkpoint"):
                self._save_if_due(batch.step + 1)
            asked = time.perf_counter()
            self.world.beat(f"reading the batch of step {batch.step + 2}")

    def _meet_at_border(self, batch: StepBatch) -> float:
        """The step's supervised tokens, over all ranks. Raises Preempted if any rank was asked to stop."""
        reason = self.stop.reason(self.world.is_main)
        n_supervised, n_requests = self.world.sum(batch.n_supervised, reason is not None)
        if n_requests:
            self._stop(batch.step, reason)
        return n_supervised

    def _stop(self, step: int, reason: str | None) -> NoReturn:
        """Saves and raises Preempted. Every rank must call it, with the reason if it knows one."""
        rank, why = next((rank, told) for rank, told in enumerate(self.world.gather(reason)) if told)
        if step:
            self._save(step)
        self.stop.done(self.world.is_main)
        self.world.barrier()  # a launcher signals the others when the first rank has gone
        saved = self.checkpoints.saved_step
        where = "from the beginning" if saved is None else f"after step {saved}"
        message = (
            f"{self.config.name}: asked to stop by {why} (rank {rank}), stopped after step {step} of {self.n_steps}; "
            f"the same command goes on {where}"
        )
        if step and saved != step:
            raise NotSavedError(f"{message}, for the last steps could not be saved")
        raise Preempted(message)

    def _log(self, step: int) -> Metrics | None:
        """Shows and keeps the line of a logged step, and returns it. Raises TooManyBadError."""
        if step % self.config.logging.every and step not in (1, self.n_steps):
            self.tracking.step(step)
            return None
        metrics = self.window.metrics(self.engine, self.world, step, self.n_steps)
        self.tracking.step(step, metrics)
        if too_many_bad(metrics["n_bad"], step, self.n_steps, self.config):
            raise TooManyBadError(metrics["n_bad"], step, self.config)
        self.window = self.window.next()
        return metrics

    def _refuse_untrained(self, metrics: Metrics | None) -> None:
        """Raises NothingTrainedError if the run ends and trained on nothing, or if many samples gave it no token."""
        if self.window.n_trained or metrics is None:
            return
        step, n_bad, n_skipped = metrics["step"], metrics["n_bad"], metrics["skipped_steps"]
        if step == self.n_steps or (not n_skipped and step * self.config.batch.size >= _FEW_SAMPLES):
            raise NothingTrainedError(n_bad, n_skipped, step, self.config)

    def _count_bad(self, batch: StepBatch, sums: torch.Tensor, norm: GradNorm, taken: bool) -> None:
        """Records a skipped step with its samples. Raises BadNumbersError after too many in a row."""
        if taken:
            self.n_bad_in_row = 0
            return
        self.n_bad_in_row += 1
        loss_sum, n_supervised = self.world.sum(*sums.sum(dim=0).tolist())
        self.tracking.bad_step(batch, loss_sum / max(n_supervised, 1.0), float(norm))
        if self.n_bad_in_row >= self.config.max_bad_steps:
            step, saved = batch.step + 1, self.checkpoints.saved_step
            raise BadNumbersError(
                f"max_bad_steps: {self.n_bad_in_row} steps in a row, up to step {step}, had a loss or gradient that is "
                f"not finite. None was taken. Their samples are in {self.config.run_dir / BAD_STEPS_FILE}; look at "
                "them, or lower the learning rate. The same command goes on "
                + ("from the beginning" if saved is None else f"after step {saved}")
            )

    def _save_if_due(self, step: int) -> None:
        every = self.config.checkpoint.every
        self.owes_save |= bool(every) and (step % (every or 1) == 0 or step == self.n_steps)
        if self.owes_save and not self.n_bad_in_row:  # else after the next step that is taken
            self._save(step)
            self.owes_save = False

    def _save(self, step: int) -> None:
        self.tracking.sync()  # what is logged up to here must not be lost when the checkpoint is not
        self.checkpoints.save(step, self.window.state(self.world))


def too_many_bad(n_bad: int, step: int, n_steps: int, config: StageConfig) -> bool:
    """Whether the samples left out in the first `step` steps are more than the stage file allows."""
    n_seen, n_all = step * config.batch.size, n_steps * config.batch.size
    return n_bad > config.max_bad_share * max(n_seen, min(n_all, _FEW_SAMPLES))


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    batch: StepBatch,
    n_supervised: float,
    watch: Stopwatch | None = None,
) -> tuple[torch.Tensor, GradNorm, bool]:
    """One optimizer step.

    Args:
        n_supervised: supervised tokens of the step, over all ranks.
        watch: times its parts `copy`, `forward`, `backward` and `optimizer`.

    Returns:
        float64 [sources, 2] on the device: this rank's summed cross entropy and number of supervised tokens by
        source; the norm of the gradient before clipping; and whether the step was taken: it is not when the
        loss of any rank, or the gradient, is not finite.
    """
    watch = watch or Stopwatch()
    scale = world.n_ranks / max(n_supervised, 1.0)
    sums = torch.zeros(len(batch.n_samples), 2, dtype=torch.float64, device=world.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
        world.touch()
        with watch("copy"):
            micro_batch = micro_batch.to(world.device)
        with watch("forward"):
            loss, losses = forward(engine, micro_batch, scale)
        # A loss may be infinite and its gradient finite. Then the gradient shall not be either, on any rank.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        with watch("backward"):
            engine.backward(loss, scale_wrt_gas=False)
        counted = torch.stack([losses, torch.ones_like(losses)], dim=1).double()
        sums.index_add_(0, micro_batch.sources, counted)
    with watch("optimizer"):
        norm, taken = optimizer_step(engine)
    return sums, norm, taken


def forward(
    engine: deepspeed.DeepSpeedEngine, batch: PackedBatch, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`PackedLoss.forward` on a pack, through the engine. `batch` is on the device."""
    return engine(**batch.model_inputs(), scale=scale)


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
            question = " Is `images:` of that source right?" if bad.kind == "image_missing" else ""
            error = BadSampleError(
                f"{bad.source}: sample {bad.id!r} ({bad.place}): {bad.reason}.{question} Mend it, or set {key}: "
                f"{remedy} to go on without it"
            )
            error.on_every_rank = bad.on_every_rank
            raise error
