"""The parts of `benchmarks/gpu.py`: what each measures, on how much work, and how long it may take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpu_kernels import attention_backends, encoder_speed, profile, unique_graphs
from rig import Rig, draw_steps, measure, start_rig, stop_rig
from shapes import stage_config
from twins import KERNELS, compare
from waits import waits_of

from llava_train.train.world import World

Result = dict[str, Any]


@dataclass
class Bench:
    """What every part is given."""

    world: World
    shape: str | None = None
    """Measures every part on this shape in place of its own."""
    results: dict[str, Result] = field(default_factory=dict)
    """Of the parts before, by name."""

    @property
    def on_cuda(self) -> bool:
        return self.world.device.type == "cuda"


@dataclass(frozen=True)
class Part:
    """One thing to measure, for itself: where it fails, the others go on."""

    name: str
    run: Callable[[Bench], Result]
    limit_s: float
    cuda_only: bool = False


@dataclass(frozen=True)
class Case:
    """Training of a shape."""

    shape: str
    stage: str
    samples: int
    """A step."""
    fits: Sequence[tuple[str, int]]
    """Activation checkpointing and tokens a pack: the first that does not run out of memory is measured."""
    kernels: str = "eager"
    steps: int = 2
    warmup_samples: int = 24
    zero: int = 2


_LORA_FITS = (("none", 8192), ("none", 4096), ("selective", 8192), ("full", 16_384))
_LORA = Case("7b", "lora", 128, _LORA_FITS)
_STAGE1 = Case("7b", "stage1", 128, (("none", 8192), ("selective", 8192), ("full", 16_384)))
_SMALLER = (("none", 16_384), ("none", 8192), ("full", 16_384))


def train(bench: Bench, case: Case, also: Callable[[Rig], Result] = lambda rig: {}) -> Result:
    """Speed and memory of a case, and what `also` finds on its rig."""
    failed: list[str] = []
    if bench.shape:
        case = replace(case, shape=bench.shape, samples=6, warmup_samples=6, fits=((case.fits[0][0], 600),))
    for recompute, max_tokens in case.fits:
        if (case.kernels, recompute) == ("compile", "selective"):
            continue  # a stage file with both is refused
        try:
            return {**_train_once(bench, case, recompute, max_tokens, also), "did_not_fit": failed}
        except torch.OutOfMemoryError as error:
            failed.append(f"{recompute} {max_tokens}: {str(error).splitlines()[0][:120]}")
        _free()
    raise RuntimeError("; ".join(failed))


def _train_once(bench: Bench, case: Case, recompute: str, max_tokens: int, also: Callable[[Rig], Result]) -> Result:
    keys = {"zero": case.zero, "activation_checkpointing": recompute, "kernels": case.kernels}
    rig = start_rig(stage_config(case.shape, case.stage, case.samples, max_tokens, **keys), bench.world)
    try:
        warm = draw_steps(rig, 1, seed=1, n_samples=case.warmup_samples)
        timed = draw_steps(rig, case.steps)
        about = {**keys, "shape": case.shape, "max_tokens": max_tokens}
        found = {**about, **measure(rig, warm + timed, len(warm))}
        try:
            found |= also(rig)
        except Exception as error:  # what was measured is not lost for it
            found["also_error"] = f"{type(error).__name__}: {error}"[:500]
        return found
    finally:
        stop_rig(rig)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def variant(kernels: str, recompute: str, max_tokens: int) -> Callable[[Bench], Result]:
    """LoRA of the 7B with these kernels and this checkpointing, on fewer samples; counts what is compiled anew."""
    case = Case("7b", "lora", 32, ((recompute, max_tokens),), kernels)

    def run(bench: Bench) -> Result:
        before = unique_graphs()

        def graphs(rig: Rig) -> Result:
            compiled = unique_graphs()
            for batch in draw_steps(rig, 2, seed=7):  # other lengths
                rig.step(batch)
            return {"graphs": compiled - before, "graphs_of_new_lengths": unique_graphs() - compiled}

        return train(bench, case, graphs if kernels == "compile" else lambda rig: {})

    return run


def best_kernels(bench: Bench) -> str:
    """Of the variants measured, the fastest kernels."""
    speeds = {
        result["kernels"]: result["tokens_per_s"]
        for name, result in bench.results.items()
        if name.startswith("7b lora, ") and "tokens_per_s" in result
    }
    return max(speeds, key=lambda kernels: speeds[kernels], default="eager")


def headline(case: Case) -> Callable[[Bench], Result]:
    """A case with the fastest kernels, its waits and its profile."""

    def also(rig: Rig) -> Result:
        (short,) = draw_steps(rig, 1, seed=2, n_samples=min(case.warmup_samples, rig.config.batch.size))
        waits = waits_of(lambda: rig.step(short), rig.world.device)
        return {
            "waits_a_step": sum(waits.values()),
            "waits": dict(waits),
            "packs_of_that_step": len(short.micro_batches),
            "profile": profile(lambda: rig.step(short), rig.world.device),
        }

    def run(bench: Bench) -> Result:
        return train(bench, replace(case, kernels=best_kernels(bench)), also)

    return run


def correctness(bench: Bench) -> Result:
    """Logits, losses and gradients against the CPU's, with each of the kernels that are there."""
    return compare(bench.world.device, KERNELS if bench.on_cuda else KERNELS[:1])


def encoder(bench: Bench) -> Result:
    """The frozen encoder of the 7B, compiled and not."""
    rig = start_rig(stage_config(bench.shape or "7b", "stage1", 8, 2048, zero=2), bench.world)
    found = encoder_speed(rig.llava.model, 64 if bench.on_cuda else 2, bench.on_cuda)
    stop_rig(rig)
    return found


def attention(bench: Bench) -> Result:
    """Attention over one pack with the heads of the 7B, by each backend."""
    heads, size, n_tokens = (32, 128, 8192) if bench.on_cuda else (4, 16, 512)
    return attention_backends(bench.world.device, heads, size, n_tokens)


PARTS: tuple[Part, ...] = (
    Part("correctness", correctness, 60),
    Part("7b lora, eager, none", variant("eager", "none", 4096), 45),
    Part("7b lora, liger, none", variant("liger", "none", 4096), 45, cuda_only=True),
    Part("7b lora, compile, none", variant("compile", "none", 4096), 110, cuda_only=True),
    Part("7b lora", headline(_LORA), 120),
    Part("7b stage 1", headline(_STAGE1), 100),
    Part("0.5b full", headline(Case("0.5b", "full", 128, _SMALLER, steps=4)), 60),
    Part("0.5b stage 1", headline(Case("0.5b", "stage1", 128, _SMALLER, steps=4)), 60),
    Part("1.5b full", headline(Case("1.5b", "full", 128, _SMALLER, steps=3)), 60),
    Part("1.5b stage 1", headline(Case("1.5b", "stage1", 128, _SMALLER, steps=3)), 60),
    Part("7b lora, eager, selective", variant("eager", "selective", 8192), 45),
    Part("7b lora, eager, full", variant("eager", "full", 16_384), 45),
    Part("attention", attention, 30),
    Part("encoder", encoder, 60),
    Part("7b lora, compile, full", variant("compile", "full", 16_384), 110, cuda_only=True),
)
