"""What the steps since the last line of metrics.jsonl add up to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import deepspeed
import torch

from llava_train.data.loader import StepBatch
from llava_train.train.grad_norm import GradNorm
from llava_train.train.histograms import Histograms
from llava_train.train.metrics import PackWork, Yardstick, peak_memory_bytes, reset_peak_memory
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.trackers import Metrics
from llava_train.train.world import World

SHARES = ("data_wait", "copy", "forward", "backward", "optimizer")
"""What the time of a step is made of, in turn."""


@dataclass
class Window:
    """Sums over the steps since the last logged one."""

    source_names: tuple[str, ...]
    n_bad: int = 0
    """Samples left out since the run began, those that this rank reports."""
    yardstick: Yardstick = field(default_factory=Yardstick)
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Times the parts of each step."""
    started: float = field(default_factory=lambda: time.perf_counter())
    data_wait_s: float = 0.0
    paused_s: dict[str, float] = field(default_factory=lambda: {"evaluation": 0.0, "checkpoint": 0.0})
    """What is no training time."""
    n_steps: int = 0
    work: PackWork = field(default_factory=PackWork)
    """Of this rank."""
    histograms: Histograms = field(default_factory=Histograms)
    """Of this rank; after an interruption rank 0 has those of all from before."""
    n_samples: list[int] = field(init=False)
    """By source, over all ranks."""
    n_before: int = 0
    """Samples from before an interruption: they count, but the time that they took is not known."""
    by_source: torch.Tensor | None = None
    """float64 [sources, 2]: this rank's summed cross entropy and supervised tokens, of the steps that were taken."""
    last: tuple[torch.Tensor, GradNorm] | None = None
    n_trained: float = 0.0
    """Supervised tokens of the steps taken since the run began, over all ranks. The training loop counts them."""

    def __post_init__(self) -> None:
        self.n_samples = [0] * len(self.source_names)

    def restart(self) -> None:
        """Forgets the time and the memory that was taken so far."""
        self.watch.read()
        reset_peak_memory()
        self.started = time.perf_counter()

    def next(self) -> Window:
        """The window after this one."""
        return Window(self.source_names, self.n_bad, self.yardstick, self.watch, n_trained=self.n_trained)

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Counts what runs inside as `evaluation` or `checkpoint`, not as training time."""
        begun = time.perf_counter()
        yield
        elapsed_s = time.perf_counter() - begun
        self.paused_s[name] += elapsed_s
        self.started += elapsed_s

    def state(self, world: World) -> dict[str, Any]:
        """What a checkpoint keeps of it. Every rank must call it."""
        own = None if self.by_source is None else self.by_source.tolist()
        sums, histograms = zip(*world.gather((own, self.histograms)), strict=True)
        total = sum(histograms, start=Histograms())
        summed = {"n_samples": self.n_samples, "sums": list(sums), "histograms": total.rows()}
        return {"n_trained": self.n_trained, **summed}

    def restore(self, state: dict[str, Any], world: World) -> None:
        """Goes on from a checkpoint's; on another number of ranks, rank 0 takes what all had."""
        self.n_trained = state.get("n_trained", 1.0)  # older checkpoints do not say, and hardly hold nothing
        if len(state["n_samples"]) != len(self.source_names):
            return  # other data, on purpose
        nothing = [[0.0, 0.0]] * len(self.source_names)
        sums = torch.tensor([own or nothing for own in state["sums"]], dtype=torch.float64)
        if len(sums) != world.n_ranks:
            sums = torch.stack([sums.sum(dim=0), *torch.zeros(world.n_ranks - 1, *sums.shape[1:])])
        self.by_source = sums[world.rank].to(world.device)
        self.n_samples = list(state["n_samples"])
        self.n_before = sum(self.n_samples)
        if world.is_main and "histograms" in state:  # older checkpoints have none
            self.histograms = Histograms(*map(tuple, state["histograms"]))

    def add(self, batch: StepBatch, world: World, sums: torch.Tensor, norm: GradNorm, taken: bool) -> None:
        self.n_steps += 1
        self.n_samples = [total + n for total, n in zip(self.n_samples, batch.n_samples, strict=True)]
        self.work = sum(map(self.yardstick.measure, batch.micro_batches), start=self.work)
        self.histograms = sum(map(self.yardstick.histograms, batch.micro_batches), start=self.histograms)
        self.n_bad += sum(world.is_main or not bad.on_every_rank for bad in batch.bad_samples)
        if taken:
            self.by_source = sums if self.by_source is None else self.by_source + sums
        self.last = sums, norm

    def metrics(self, engine: deepspeed.DeepSpeedEngine, world: World, step: int, n_steps: int) -> Metrics:
        """The logged line, on every rank: loss and gradient norm of the last step, sources and rates of the window."""
        assert self.last is not None
        sums, norm = self.last
        by_source = torch.zeros_like(sums) if self.by_source is None else self.by_source
        seconds = self._seconds()
        (loss_sum, n_supervised), seconds_of_all, work, lengths, fill, (n_bad,), of_sources = _sums(
            world,
            sums.sum(dim=0),
            list(seconds.values()),
            astuple(self.work),
            *self.histograms.rows(),
            [self.n_bad],
            by_source,
        )
        elapsed_s = time.perf_counter() - self.started
        mean_s = {name: total / world.n_ranks for name, total in zip(seconds, seconds_of_all, strict=True)}
        lr = {group["name"]: group["lr"] for group in engine.optimizer.param_groups if "decay" not in group["name"]}
        return {
            "step": step,
            "time": time.time(),
            "loss": loss_sum / max(n_supervised, 1.0),
            "grad_norm": float(norm),
            "grad_norms": {part: norm.of_part(part) for part in lr},
            "lr": lr,
            "n_supervised": int(n_supervised),
            "sources": self._of_sources(of_sources),
            "n_bad": int(n_bad),
            "skipped_steps": engine.skipped_steps,
            "step_s": elapsed_s / self.n_steps,
            "time_left_s": (n_steps - step) * elapsed_s / self.n_steps,
            "samples_per_s": (sum(self.n_samples) - self.n_before) / elapsed_s,
            **self._speed(PackWork(*map(int, work)), elapsed_s, world.n_ranks),
            "data_wait_s": mean_s["data_wait"] / self.n_steps,
            **{f"{name}_share": mean_s[name] / elapsed_s for name in SHARES},
            **{f"{name}_s": mean_s[name] for name in self.paused_s},
            "peak_memory_bytes": max(world.gather(peak_memory_bytes(world.device))),
            "sample_lengths": list(map(int, lengths)),
            "pack_fill": list(map(int, fill)),
        }

    def _seconds(self) -> dict[str, float]:
        """Of each share, and of what is no training time, on this rank. Waits for the device."""
        spent = defaultdict(float, self.watch.read())
        spent["backward"] -= spent["reduction"]  # which is its end
        spent["optimizer"] += spent["reduction"]
        spent["data_wait"] = self.data_wait_s
        return {**{name: spent[name] for name in SHARES}, **self.paused_s}

    def _speed(self, work: PackWork, elapsed_s: float, n_ranks: int) -> Metrics:
        """Rates of the work of all ranks; FLOP/s and MFU of one device, None where they are not known."""
        flops_per_s = work.flops / elapsed_s / n_ranks
        flops, peak = self.yardstick.flops, self.yardstick.peak_flops
        return {
            "tokens_per_s": work.n_tokens / elapsed_s,
            "text_tokens_per_s": work.n_text_tokens / elapsed_s,
            "images_per_s": work.n_images / elapsed_s,
            "padding_share": work.n_padding_tokens / max(work.n_tokens + work.n_padding_tokens, 1.0),
            "tflops_per_s": flops_per_s / 1e12 if flops else None,
            "mfu": flops_per_s / peak if flops and peak else None,
        }

    def _of_sources(self, by_source: Sequence[float]) -> dict[str, Metrics]:
        """Mean loss, supervised tokens and samples of each source that had any."""
        each = zip(self.source_names, by_source[::2], by_source[1::2], self.n_samples, strict=True)
        return {
            name: {"loss": loss_sum / max(count, 1.0), "n_supervised": int(count), "n_samples": n_samples}
            for name, loss_sum, count, n_samples in each
            if n_samples
        }


def _sums(world: World, *groups: torch.Tensor | Sequence[float]) -> list[list[float]]:
    """The numbers of each group, summed over the ranks in one message."""
    tensors = [torch.as_tensor(group, dtype=torch.float64, device=world.device).flatten() for group in groups]
    totals = torch.cat(tensors)
    torch.distributed.all_reduce(totals)
    return [part.tolist() for part in totals.cpu().split([len(tensor) for tensor in tensors])]
