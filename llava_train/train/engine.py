"""DeepSpeed: the engine's configuration, its start, its steps."""

from __future__ import annotations

import copy
import gc
import os
from contextlib import suppress
from importlib import import_module
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from llava_train.config import StageConfig
from llava_train.contradictions import user_deepspeed
from llava_train.model.trainable import part_of
from llava_train.train.checkpoint_files import DurableFiles
from llava_train.train.grad_norm import GradNorm, keep_group_norms, taken_group_norms
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.world import World

BUCKET_ELEMENTS = 200_000_000
_TORCHS_LINEAR = torch.nn.functional.linear


def deepspeed_config(config: StageConfig, n_trainable: int, universal: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration of a stage; the user's own JSON adds keys that the stage file does not own.

    Batch keys are 1: the loop decides itself how many micro-steps a step has.

    Args:
        universal: the checkpoint to load is in DeepSpeed's universal format.
    """
    engine = config.engine
    bf16 = engine.precision == "bf16"
    zero: dict[str, Any] = {"stage": engine.zero}
    if engine.zero:
        bucket = max(1, min(BUCKET_ELEMENTS, n_trainable))
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_batch_size": int(os.environ["WORLD_SIZE"]),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.schedule.clip or 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 2**62,
    }
    user = user_deepspeed(engine)
    if "timers" not in user:  # a measurement that nobody reads, for which every micro-step would wait for the device
        ours["timers"] = {"throughput": {"enabled": False}}
    if bf16 and engine.zero:
        # Micro-steps add up in float32, so that their number does not change the gradient.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(ours, user)


def start_engine(
    module: nn.Module, groups: list[dict[str, Any]], config: StageConfig, universal: bool = False
) -> deepspeed.DeepSpeedEngine:
    """Wraps a module, whose parameters in `groups` AdamW trains. The module is moved to the device."""
    n_trainable = sum(parameter.numel() for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, fused=True)
    settings = deepspeed_config(config, n_trainable, universal)
    _import_muon()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    every_name = module.named_parameters(remove_duplicate=False)
    engine.checkpoint_engine = DurableFiles(frozenset(name for name, p in every_name if not p.requires_grad))
    # A script for people without plain weights: copying it may fail on one rank and leave the others waiting.
    engine._copy_recovery_script = lambda save_path: None
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _forget_first_step(engine.optimizer)
    if engine.zero_optimization():
        keep_group_norms(engine.optimizer)
    return engine


def _import_muon() -> None:
    """DeepSpeed asks every optimizer whether it is Muon, whose functions are compiled: making them so took 0.9 s."""
    with suppress(ImportError), mock.patch.object(compiler, "compile", lambda: lambda function: function):
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def time_reduction(engine: deepspeed.DeepSpeedEngine, watch: Stopwatch) -> None:
    """Times what `engine.backward` ends with, the sum of the gradients over ranks, as `reduction`.

    Sums that DeepSpeed runs beside the backward pass (ZeRO 2 and 3) cost no time of their own.
    """
    engine.allreduce_gradients = watch.timing("reduction", engine.allreduce_gradients)


def stop_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Lets go of an engine, and of what DeepSpeed put in torch's place: a later stage must round as it does alone."""
    engine.destroy()
    torch.nn.functional.linear = _TORCHS_LINEAR
    # Under ZeRO 3 two places of DeepSpeed keep the whole model; the second is the cache of a method, in its closure.
    FWD_MODULE_STACK.clear()
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        cell.cell_contents.cache_clear()


def free_memory() -> None:
    """Gives back what stopped engines held: they are circles of references, and memory that runs out breaks none."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gathered(engine: deepspeed.DeepSpeedEngine, world: World, module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole trainable parameters of `module` (the engine's, or inside it) by name, on the CPU of rank 0.

    Every rank must call it: under ZeRO 3 the parameters are spread over the ranks. Other ranks get {}.
    """
    state = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            if world.is_main:
                state[name] = parameter.detach().cpu().clone()
    return state


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> tuple[GradNorm, bool]:
    """Takes the optimizer step, unless the gradient is not finite.

    DeepSpeed skips such a step in silence, apart from float32 without ZeRO, where it would ruin the weights.

    Returns:
        The norm of the gradient before clipping, and whether the step was taken.
    """
    n_skipped = engine.skipped_steps
    if engine.zero_optimization():
        engine.step()
        norm = GradNorm(engine.get_global_grad_norm(), taken_group_norms(engine.optimizer))
        return norm, engine.skipped_steps == n_skipped
    named = [(name, p.grad) for name, p in engine.module.named_parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for _, gradient in named]
    whole = torch.linalg.vector_norm(torch.stack(norms))  # DeepSpeed keeps none
    norm = GradNorm(whole, [(part_of(name), piece) for (name, _), piece in zip(named, norms, strict=True)])
    if not whole.isfinite():
        engine.zero_grad()
        engine.skipped_steps += 1
        return norm, False
    engine.step()
    return norm, engine.skipped_steps == n_skipped


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`theirs` added to `ours`; where both say something (equal, or "auto", by the checks of config), ours."""
    merged = copy.deepcopy(theirs)
    for key, value in ours.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        if key in ("reduce_bucket_size", "allgather_bucket_size") and key in merged:
            continue
        merged[key] = _merge(value, merged[key]) if nested else value
    return merged


def _forget_first_step(optimizer: FP16_UnfusedOptimizer) -> None:
    """Undoes the step that DeepSpeed takes at the start in bf16 without ZeRO, on gradients of zero.

    It decays the weights, and AdamW would take the first real step, its bias correction off by one, for the second.
    """
    for state in optimizer.optimizer.state.values():
        state["step"].zero_()
    optimizer.refresh_fp32_params()
