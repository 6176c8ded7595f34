"""What a run says at its start: what trains, on what, how, and for how long. `console` shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from llava_train.config import StageConfig
from llava_train.data.mixture import Mixture
from llava_train.model.trainable import PartSummary
from llava_train.train.heaviest import PackShape
from llava_train.train.pace import ASSUMED_MFU, N_MEASURED, about
from llava_train.train.resume import Resumption
from llava_train.train.schedule import unreached_steps

_MOST_SOURCES = 6


@dataclass(frozen=True)
class Overview:
    """What is known of a stage before it trains."""

    config: StageConfig
    parts: tuple[PartSummary, ...]
    came_from: str
    """Where the trained parts have their values from."""
    mixture: Mixture
    held_out: Mixture | None
    n_steps: int
    n_ranks: int
    device: torch.device
    pack: PackShape
    """The heaviest of a rank."""
    memory: str
    """The estimate in words."""
    step_s: float | None
    """Expected of a step, where the devices' peak is known."""
    resumption: Resumption

    def rows(self) -> Iterator[tuple[str, str]]:
        """A label and a text each; further lines of a label have none."""
        yield "starts from", self.came_from
        labels = iter(["data"])
        for line in self._data():
            yield next(labels, ""), line
        yield "a step", self._batch()
        yield "devices", self._devices()
        yield "memory", self.memory
        yield "steps", self._steps()
        if time := self._time():
            yield "time", time

    def _data(self) -> Iterator[str]:
        sources = self.mixture.sources
        for number, source in islice(enumerate(sources), _MOST_SOURCES):
            repeat = self.config.data[number].take.repeat
            n_taken = len(self.mixture.taken_of(number)) // repeat
            of_all = f" of {len(source):,}" if n_taken < len(source) else ""
            yield f"{source.name}: {n_taken:,}{of_all} samples" + (f", each {repeat} times" if repeat > 1 else "")
        if len(sources) > _MOST_SOURCES:
            yield f"and {len(sources) - _MOST_SOURCES} more sources"
        if len(sources) > 1:
            yield f"in all: {len(self.mixture):,} samples an epoch"
        if self.held_out is not None and self.config.eval is not None:
            n_held_out = min(len(self.held_out), self.config.eval.max_samples)
            yield f"held out: {n_held_out:,} samples, looked at every {self.config.eval.every:,} steps"

    def _batch(self) -> str:
        batch = self.config.batch
        if not batch.packing:
            return f"{batch.size:,} samples, each by itself (batch.packing: false)"
        less = f" (batch.max_tokens: {batch.max_tokens:,})" if self.pack.n_tokens < batch.max_tokens else ""
        return f"{batch.size:,} samples in packs of at most {self.pack}{less}"

    def _devices(self) -> str:
        engine = self.config.engine
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        offloaded = [what for what in ("optimizer", "parameters") if getattr(engine, f"offload_{what}")]
        moved = f", {' and '.join(offloaded)} offloaded" if offloaded else ""
        ranks = f"{self.n_ranks:,} ranks, each on" if self.n_ranks > 1 else "1 rank on"
        return f"{ranks} {name}, ZeRO {engine.zero}{moved}, {engine.precision}, {engine.kernels} kernels"

    def _steps(self) -> str:
        epochs = self.n_steps * self.config.batch.size / len(self.mixture)
        every = self.config.checkpoint.every
        saved = f"a checkpoint every {every:,}" if every else "no checkpoints"
        return f"{self.n_steps:,}, {epochs:.3g} epoch{'s' * (f'{epochs:.3g}' != '1')}; {saved}"

    def _time(self) -> str:
        n_left, later = self.n_steps - self.resumption.step, "measured after a few steps"
        if self.step_s:
            return f"about {about(n_left * self.step_s)}, if {ASSUMED_MFU:.0%} of the peak is reached; {later}"
        return later if n_left > N_MEASURED + 1 else ""

    def notes(self) -> Iterator[str]:
        """Lines on where the run stands, and on what its user may not have meant."""
        for reason in self.resumption.passed_over:
            yield f"passed over {reason}"
        if self.resumption.step:
            yield f"resuming after step {self.resumption.step} of {self.n_steps}"
        if unreached := unreached_steps(self.config.schedule, len(self.mixture), self.config.batch.size):
            yield f"note: {unreached}"
