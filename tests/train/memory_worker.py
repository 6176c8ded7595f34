"""Measures the memory of a real engine's steps on the heaviest pack, for `test_memory`; run by `helpers.run_ranks`.

python -m tests.train.memory_worker OUT STAGE [STAGE ...]

On a CPU every tensor allocation and release of PyTorch's allocator is in a profile of a step, and before it the living
tensors are counted; a GPU's allocator knows its peak. Rank 0 writes {stage file: {"measured", "estimated"}} in bytes,
without CUDA's own.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llava_train.data.loader import StepBatch
from llava_train.devices import DTYPES
from llava_train.model.build import build_llava
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.stage_file import load_stage
from llava_train.train.assembly import prepare_modes
from llava_train.train.engine import start_engine
from llava_train.train.heaviest import imitate
from llava_train.train.loop import train_step
from llava_train.train.memory import Estimator
from llava_train.train.world import World, start_distributed

_WARM_UP = {3: 2}
"""Steps until the optimizer has its moments, and ZeRO 3 knows in which order it gathers; else one."""


def measure(path: Path, world: World) -> dict[str, Any]:
    config = load_stage(path, [])
    llava = build_llava(config.model, config.image, DTYPES[config.engine.precision], config.seed)
    set_trainable(llava.model, config.trainable, config.seed)
    recompute: Any = config.engine.activation_checkpointing
    prepare_modes(llava, config, recompute)
    estimator = Estimator(llava.model.config, world.n_ranks, world.device.type)
    told = estimator.estimate(config, recompute)
    groups = parameter_groups(llava.model, config.trainable, 0.0)
    engine = start_engine(PackedLoss(llava.model), groups, config)
    batch = imitate(told.pack, llava.model.config.image_token_id, world.device)
    step = StepBatch(0, (batch, batch), (1,), ())
    for _ in range(_WARM_UP.get(config.engine.zero, 1)):
        train_step(engine, world, step, 1000.0)
    measured = peak_of(lambda: train_step(engine, world, step, 1000.0), world)
    engine.destroy()
    return {"measured": measured, "estimated": told.total_bytes - told.context, "parts": told.as_record()}


def peak_of(call: Callable[[], Any], world: World) -> int:
    """The most bytes of tensors that live at once on this rank's device while `call` runs."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    before = living_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return before + highest(profiled)


def living_bytes() -> int:
    """The bytes of all tensors that Python can reach, their gradients included."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def highest(profiled: Any) -> int:
    """The most bytes allocated at any moment of a profile, above those at its start."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def main() -> None:
    out, *paths = sys.argv[1:]
    world, results = start_distributed(), {}
    for path in paths:
        results[path] = measure(Path(path), world)
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
