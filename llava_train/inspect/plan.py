"""What a stage will take, told without weights and without a GPU: memory, packs, steps, hours.

    lengths of the data (measured, or assumed where there is none) -> packs of some steps -> micro-steps, FLOPs
    the parts' config.json -> a model without weights -> memory on each GPU, and what to change if it does not fit

Hours are the FLOPs that the mathematics needs, over a share of what the GPU can do by its datasheet, or over what a few
steps on this machine reached (`plan_measure`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import LlavaConfig

from llava_train.config import StageConfig
from llava_train.data.order import n_steps_of, step_samples
from llava_train.data.packing import attention_cost_of, plan_packs
from llava_train.devices import DTYPES
from llava_train.inspect.plan_lengths import Lengths, PlanError, find_lengths
from llava_train.model.processor import build_processor
from llava_train.model.skeleton import config_without_weights, skeleton
from llava_train.train.activations import NotImitatedError
from llava_train.train.device_peaks import multiplied_in, peak_flops
from llava_train.train.memory import GIB, MARGIN, Estimate, Estimator, ways
from llava_train.train.metrics import ModelFlops, model_flops
from llava_train.train.pace import ASSUMED_MFU, figure
from llava_train.train.remedies import Remedy, find_remedy
from llava_train.train.schedule import unreached_steps

DEVICES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "L4": "NVIDIA L4",
    "L40S": "NVIDIA L40S",
    "RTX3090": "NVIDIA GeForce RTX 3090",
    "RTX4090": "NVIDIA GeForce RTX 4090",
    "RTX5090": "NVIDIA GeForce RTX 5090",
}
"""Short names of GPUs whose peak is known, see `train.device_peaks`."""
CPU = "CPU"
"""The name of a device that has no peak by a datasheet."""
_N_STEPS = 100


@dataclass(frozen=True)
class Speed:
    """How fast one device trains."""

    words: str
    """What it is known from, or why it is not known."""
    flops_per_s: float | None = None
    step_s: float | None = None
    """Of one device alone, where it was measured."""


@dataclass(frozen=True)
class Packing:
    """How the samples of a step fall into packs, on the average."""

    micro_steps: float
    """Of a step, on each rank."""
    tokens: float
    """Of a step, over all ranks."""
    fill: float
    """Share of `batch.max_tokens` that a pack has. No padding is computed for the rest."""
    balance: float
    """Mean over greatest load of the ranks in a micro-step."""
    critical_flops: float | None
    """Of the costliest rank in each micro-step of a step; None where the model's FLOPs are not known."""


@dataclass(frozen=True)
class Plan:
    """What a stage will take."""

    config: StageConfig
    n_ranks: int
    on_cuda: bool
    """Whether it is planned for GPUs, or for CPUs."""
    memory: int
    """Of each GPU, or of each process on CPUs, in bytes."""
    estimates: tuple[Estimate, ...]
    """By way of activation checkpointing; the last is the one that the run takes."""
    remedy: Remedy | None
    """What to change; None where it fits, or where nothing helps."""
    lengths: Lengths
    packing: Packing
    n_steps: int | None
    hours: float | None
    speed: str
    """What the hours are computed from, or why they are not known, in words."""
    notes: tuple[str, ...] = ()
    """What the user may not have meant."""

    @property
    def estimate(self) -> Estimate:
        return self.estimates[-1]

    @property
    def fits(self) -> bool:
        return self.estimate.total_bytes <= usable(self.memory)


def usable(memory: int) -> int:
    """Bytes of a GPU that a step may take."""
    return int(memory * (1 - MARGIN))


def make_plan(
    config: StageConfig,
    n_ranks: int,
    memory: int,
    device: str = "H100",
    tflops: float | None = None,
    mfu: float = ASSUMED_MFU,
    measured: Speed | None = None,
) -> Plan:
    """Plans a stage. Raises UserError.

    Args:
        memory: bytes of each GPU, or of each process on CPUs.
        device: a GPU of `DEVICES`, or its full name, or `CPU`.
        tflops: the peak of each device in the stage's precision, in place of that of `device`.
        mfu: share of the peak that a run uses.
        measured: the speed of the stage on `device`, in place of a share of its peak.
    """
    speed = measured or _by_datasheet(config.engine.precision, device, tflops, mfu)
    front = build_processor(config.model, config.image)
    llava = config_without_weights(config.model, front)
    lengths = find_lengths(config, front)
    on_cuda = device.upper() != CPU
    estimator = Estimator(llava, n_ranks, "cuda" if on_cuda else "cpu", lengths.longest)
    estimates = _estimates(estimator, config, usable(memory))
    remedy = None
    if estimates[-1].total_bytes > usable(memory):
        remedy = find_remedy(estimator, config, estimates[-1].recompute, usable(memory))
    packing = pack_some(config, lengths, n_ranks, llava.text_config.hidden_size, _flops(config, llava))
    n_steps, notes = config.schedule.max_steps, list[str]()
    if lengths.n_samples is not None:
        n_steps = n_steps_of(lengths.n_samples, config.batch.size, config.schedule.epochs, n_steps)
        unreached = unreached_steps(config.schedule, lengths.n_samples, config.batch.size)
        notes += [unreached] if unreached else []
    hours, words = _hours(speed, packing, n_steps, n_ranks)
    return Plan(
        config, n_ranks, on_cuda, memory, estimates, remedy, lengths, packing, n_steps, hours, words, tuple(notes)
    )


def _hours(speed: Speed, packing: Packing, n_steps: int | None, n_ranks: int) -> tuple[float | None, str]:
    """Hours of all steps, and what they are computed from; None and why they are not known."""
    flops = packing.critical_flops
    if n_steps is None:
        return None, "the number of samples is not known"
    if flops and speed.flops_per_s:
        return n_steps * flops / speed.flops_per_s / 3600, speed.words
    if speed.step_s:
        return n_steps * speed.step_s / n_ranks / 3600, speed.words
    unknown = "the model's FLOPs are not known; --measure runs a few steps on this machine"
    return None, unknown if speed.flops_per_s else speed.words


def bytes_of(text: str) -> int:
    """`80G` or `24GiB` in bytes; vendors' GB are about GiB. Raises PlanError."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b").removesuffix("g")
    try:
        n_bytes = int(float(number) * GIB)
    except (ValueError, OverflowError):
        n_bytes = 0
    if n_bytes <= 0:
        raise PlanError(f"--memory {text}: write the memory of one GPU as 80G")
    return n_bytes


def pack_some(
    config: StageConfig, lengths: Lengths, n_ranks: int, hidden_size: int, flops: ModelFlops | None
) -> Packing:
    """Packs the first steps of the run where the lengths of all its samples are known, else steps drawn from some."""
    rng, batch = np.random.default_rng(config.seed), config.batch
    n_micro, loads, worst_loads, critical, n_packs = 0, 0, 0, 0.0, 0
    n_planned = 0
    for step in range(_N_STEPS):
        if lengths.numbers is None:
            chosen = rng.integers(0, len(lengths.n_tokens), batch.size)
        elif step * batch.size < len(lengths.numbers) and lengths.n_samples:
            chosen = np.searchsorted(lengths.numbers, step_samples(step, config.seed, lengths.n_samples, batch.size))
        else:
            break
        chosen = chosen[lengths.n_tokens[chosen] > 0]
        if not len(chosen):
            continue
        sizes = lengths.n_tokens[chosen].tolist()
        packs = plan_packs(sizes, n_ranks, batch.max_tokens, attention_cost_of(hidden_size), batch.packing)
        n_planned += 1
        n_micro += len(packs[0])
        n_packs += len(packs[0]) * n_ranks
        for micro in range(len(packs[0])):
            of_ranks = [chosen[packs[rank][micro]] for rank in range(n_ranks)]
            tokens = [int(lengths.n_tokens[pack].sum()) for pack in of_ranks]
            loads, worst_loads = loads + sum(tokens), worst_loads + max(tokens)
            critical += max(_pack_flops(flops, lengths, pack) for pack in of_ranks)
    if not n_planned:
        raise PlanError("data: none of the samples looked at can be read; `llava-train check` tells why")
    return Packing(
        micro_steps=n_micro / n_planned,
        tokens=loads / n_planned,
        fill=loads / (n_packs * batch.max_tokens),
        balance=loads / (worst_loads * n_ranks),
        critical_flops=critical / n_planned if flops else None,
    )


def _pack_flops(flops: ModelFlops | None, lengths: Lengths, pack: np.ndarray) -> int:
    if flops is None:
        return 0
    n_images, n_supervised = int(lengths.n_images[pack].sum()), int(lengths.n_supervised[pack].sum())
    return flops.of_pack(lengths.n_tokens[pack].tolist(), n_images, n_supervised).total


def _estimates(estimator: Estimator, config: StageConfig, budget: int) -> tuple[Estimate, ...]:
    found: list[Estimate] = []
    try:
        for recompute in ways(config):
            found.append(estimator.estimate(config, recompute))
            if found[-1].total_bytes <= budget:
                break
    except NotImitatedError as error:
        raise PlanError(f"model.language_model: {error}") from error
    return tuple(found)


def _flops(config: StageConfig, llava: LlavaConfig) -> ModelFlops | None:
    model = skeleton(llava, config.trainable, DTYPES[config.engine.precision])
    return model_flops(model, llava.image_seq_length, config.loader.cache_features)


def _by_datasheet(precision: Literal["bf16", "fp32"], device: str, tflops: float | None, mfu: float) -> Speed:
    """A share of the peak of a device. Raises PlanError."""
    if tflops is not None and not 0 < tflops < math.inf:
        raise PlanError(f"--tflops {tflops:g}: write the peak of one device in TFLOP/s, as 989")
    multiplied = multiplied_in(precision)
    peak = tflops * 1e12 if tflops else peak_flops(DEVICES.get(device.upper(), device), multiplied)
    if peak:
        named = "--tflops" if tflops else f"{device} in {multiplied}"
        return Speed(f"{figure(100 * mfu)}% of {figure(peak / 1e12)} TFLOP/s ({named}), assumed", peak * mfu)
    if device.upper() == CPU:
        return Speed("a CPU has no peak by a datasheet; --measure runs a few steps on this machine, or give --tflops")
    known = ", ".join([*DEVICES, CPU])
    raise PlanError(f"--device {device}: its peak is not known; choose {known}, or give --tflops")


def as_record(plan: Plan) -> dict[str, Any]:
    """A plan as plain values: what `--json` prints."""
    packing, lengths = plan.packing, plan.lengths
    return {
        "name": plan.config.name,
        "fits": plan.fits,
        "gpus": plan.n_ranks,
        "device": "cuda" if plan.on_cuda else "cpu",
        "memory_bytes": plan.memory,
        "usable_bytes": usable(plan.memory),
        "estimate": plan.estimate.as_record(),
        "tried": {one.recompute: one.total_bytes for one in plan.estimates},
        "change": plan.remedy and {"set": list(plan.remedy.changes), "total_bytes": plan.remedy.estimate.total_bytes},
        "data": {
            "origin": lengths.origin,
            "n_samples": lengths.n_samples,
            "mean_tokens": float(lengths.n_tokens.mean()),
            "max_tokens": int(lengths.n_tokens.max()),
        },
        "micro_steps_a_step": packing.micro_steps,
        "packs_a_step": packing.micro_steps * plan.n_ranks,
        "tokens_a_step": packing.tokens,
        "fill": packing.fill,
        "balance": packing.balance,
        "flops_a_step_critical": packing.critical_flops,
        "n_steps": plan.n_steps,
        "hours": plan.hours,
        "speed": plan.speed,
        "notes": list(plan.notes),
    }
