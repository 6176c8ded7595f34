"""The memory that a stage takes on each device, estimated before anything is loaded.

What a step holds at its worst moment is

    weights + gradients + optimizer + buckets + gathered weights + CUDA itself, or the kernels that a CPU compiles
    + the most of  activations | reducing gradients | the optimizer's step

Activations are found by running a pack on shapes alone (`activations`); the rest is arithmetic over the numbers of
parameters (`holdings`). Both were compared with measured peaks: tests/train/test_memory.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from transformers import LlavaConfig

from llava_train.config import StageConfig
from llava_train.data.lengths import Longest
from llava_train.data.loader import filler_lengths
from llava_train.data.packing import attention_cost_of
from llava_train.devices import DTYPES
from llava_train.model.recompute import RECOMPUTES, Recompute
from llava_train.model.skeleton import skeleton
from llava_train.onednn import compiles_each_shape, kernels_bytes
from llava_train.train.activations import NotImitatedError, activation_bytes, unimitated
from llava_train.train.heaviest import PackShape, heaviest_pack
from llava_train.train.holdings import Held, held_bytes, size_of

GIB = 2**30
MARGIN = 0.06
"""Share of a device's memory that is left free: an allocator cannot use every gap between its blocks."""
_CONTEXT_BYTES, _NCCL_BYTES = 3 * GIB // 4, GIB // 2
"""What CUDA and its libraries hold in each process, and NCCL's buffers."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on a device at the worst moment of a step."""

    held: Held
    activations: int
    """Of the heaviest pack, logits and the loss included."""
    context: int
    """Of CUDA itself; on a CPU, of the kernels that oneDNN compiles and keeps."""
    pack: PackShape
    recompute: Recompute
    on_cuda: bool = True

    @property
    def total_bytes(self) -> int:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Bytes by what they are for, adding up to `total_bytes`."""
        held = self.held
        moments = {
            "activations": self.activations + held.fetching + held.reducing * held.reduces_in_backward,
            "reducing gradients": held.reducing,
            "the optimizer's step": held.stepping,
        }
        worst = max(moments, key=moments.__getitem__)
        kinds = {f"weights of {part}": n_bytes for part, n_bytes in held.weights.items()}
        kinds |= {"gradients": held.gradients, "optimizer": held.optimizer, "buckets": held.buckets}
        kinds["gathered weights"] = held.gathered
        if worst == "activations":
            kinds["reducing gradients"] = held.reducing * held.reduces_in_backward
            kinds["fetching weights"] = held.fetching
            kinds["activations"] = self.activations
        else:
            kinds[worst] = moments[worst]
        kinds["CUDA" if self.on_cuda else "compiled kernels"] = self.context
        return {kind: n_bytes for kind, n_bytes in kinds.items() if n_bytes}

    def as_record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "total_bytes": self.total_bytes,
            "host_bytes": self.held.on_host,
            "by_kind": self.by_kind(),
            "activation_checkpointing": self.recompute,
            "pack": {**asdict(self.pack), "n_tokens": self.pack.n_tokens},
        }


@dataclass(frozen=True)
class Choice:
    """What `engine.activation_checkpointing` comes to, and what it was chosen by."""

    estimator: Estimator
    config: StageConfig
    budget: int
    """Bytes that a step may take on each device."""
    recompute: Recompute
    tried: tuple[Estimate, ...] = ()
    """The last is that of `recompute`; none where the model cannot be run without values."""
    why_not: str = ""
    """Why nothing is estimated."""

    @property
    def estimate(self) -> Estimate | None:
        return self.tried[-1] if self.tried else None

    @property
    def line(self) -> str:
        """The estimate of a rank's memory in words."""
        way = f"activation_checkpointing {self.recompute}"
        if self.config.engine.activation_checkpointing == "auto":
            way += " (auto)"
        if self.estimate is None:
            return f"not estimated: {self.why_not}; {way}"
        total = self.estimate.total_bytes
        fits = "of" if total <= self.budget else "more than the"
        worse = "".join(f"; {gib(one.total_bytes)} with {one.recompute}" for one in self.tried[:-1])
        besides = "" if self.estimator.on_cuda else "; Python and its libraries not counted"
        return f"about {gib(total)} {fits} {gib(self.budget)}; {way}{worse}{besides}"


class Estimator:
    """Estimates stage files that differ in few keys; what a pack takes is measured once.

    Args:
        llava: the model's configuration.
        device_type: on a CPU, what is offloaded lies in the same memory.
        longest: the greatest samples of the run, where all were measured; see `heaviest_pack`.
    """

    def __init__(self, llava: LlavaConfig, n_ranks: int, device_type: str, longest: Longest | None = None) -> None:
        self.llava, self.n_ranks, self.on_cuda = llava, n_ranks, device_type == "cuda"
        self.longest = longest
        self._activations: dict[Any, int] = {}

    def pack(self, config: StageConfig) -> PackShape:
        """The heaviest pack of a rank, filled up where the run's packs are."""
        size = config.image.size or self.llava.vision_config.image_size
        cost = attention_cost_of(self.llava.text_config.hidden_size)
        pack = heaviest_pack(config.batch, self.n_ranks, self.llava.image_seq_length, size, cost, self.longest)
        if not self._compiles_each_shape(config):
            return pack
        return replace(pack, lengths=(*pack.lengths, *filler_lengths(pack.lengths, config.batch.max_tokens)))

    def estimate(self, config: StageConfig, recompute: Recompute) -> Estimate:
        """The memory of a stage on each device, whatever `engine.activation_checkpointing` says.

        Raises NotImitatedError.
        """
        lora = config.trainable.lora
        quantized = lora is not None and lora.quantize_base is not None
        with unimitated(self.llava):
            size = size_of(skeleton(self.llava, config.trainable, DTYPES[config.engine.precision]), quantized)
        held, pack = held_bytes(size, config.engine, self.n_ranks), self.pack(config)
        if not self.on_cuda:
            held = replace(held, optimizer=held.optimizer + held.on_host, on_host=0)
        key = (config.trainable.model_dump_json(), config.engine.precision, pack, recompute)
        if key not in self._activations:
            self._activations[key] = activation_bytes(config, self.llava, pack, recompute, self.on_cuda)
        if self.on_cuda:
            context = _CONTEXT_BYTES + _NCCL_BYTES * (self.n_ranks > 1)
        else:
            context = kernels_bytes() * self._compiles_each_shape(config)
        return Estimate(held, self._activations[key], context, pack, recompute, self.on_cuda)

    def _compiles_each_shape(self, config: StageConfig) -> bool:
        return not self.on_cuda and compiles_each_shape(torch.device("cpu"), DTYPES[config.engine.precision])

    def choose(self, config: StageConfig, budget: int) -> Choice:
        """The way of activation checkpointing that the stage file names, for `auto` the first that fits.

        Args:
            budget: bytes that a step may take on each device.
        """
        asked, tried = config.engine.activation_checkpointing, list[Estimate]()
        try:
            for recompute in ways(config):
                tried.append(self.estimate(config, recompute))
                if tried[-1].total_bytes <= budget:
                    break
        except NotImitatedError as error:
            return Choice(self, config, budget, "full" if asked == "auto" else asked, why_not=str(error))
        return Choice(self, config, budget, tried[-1].recompute, tuple(tried))


def ways(config: StageConfig) -> tuple[Recompute, ...]:
    """What `engine.activation_checkpointing` comes to, in the order that it is tried."""
    asked = config.engine.activation_checkpointing
    if asked != "auto":
        return (asked,)
    # contradictions.py says why compiled layers have no `selective`
    return tuple(way for way in RECOMPUTES if way != "selective" or config.engine.kernels != "compile")


def budget_of(device: torch.device, n_ranks_on_node: int, loaded: int = 0) -> int:
    """Bytes that a step may take on this rank's device: a GPU's memory, or this rank's share of what RAM is left.

    Args:
        loaded: bytes of the model that this process holds already, on a CPU.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * (1 - MARGIN))
    return int((psutil.virtual_memory().available / n_ranks_on_node + loaded) * (1 - MARGIN))


def gib(n_bytes: float) -> str:
    """Bytes for people: `12.3 GiB`, `45.6 MiB`, `7.8 KiB`."""
    unit, name = next((pair for pair in ((GIB, "GiB"), (2**20, "MiB")) if n_bytes >= pair[0]), (2**10, "KiB"))
    return f"{n_bytes / unit:,.1f} {name}"
