"""DeepSpeed: the processes of a run, the engine's configuration, and its start."""

from __future__ import annotations

import copy
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from llava_train.config import StageConfig
from llava_train.contradictions import user_deepspeed
from llava_train.errors import UserError

_BUCKET_ELEMENTS = 200_000_000


class LaunchError(UserError):
    """The processes of the run were started in a way that cannot work."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    n_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_distributed() -> World:
    """Joins the processes that `deepspeed` or `torchrun` started; alone under plain `python`.

    Raises:
        LaunchError: one of several tasks of `srun`, each of which would take itself for the whole run.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    n_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if n_tasks > 1 and "RANK" not in os.environ:
        raise LaunchError(
            f"srun started {n_tasks} tasks without telling them their RANK, so each would train alone; start one task "
            "a node, and torchrun in it"
        )
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }.items():
        os.environ.setdefault(name, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # On CPUs DeepSpeed would compile a collective of its own. That takes a compiler, and a build that was killed
    # leaves a lock on which every later run waits for ever. Gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def imitates_bf16(device: torch.device) -> bool:
    """Whether a device is a CPU without instructions for bf16: it is tens of times slower there than fp32."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def deepspeed_config(config: StageConfig, n_trainable: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a stage; the user's own JSON adds keys that the stage file does not own.

    Batch keys are 1: the loop decides itself how many micro-steps a step has.
    """
    engine = config.engine
    bf16 = engine.precision == "bf16"
    zero: dict[str, Any] = {"stage": engine.zero}
    if engine.zero:
        bucket = max(1, min(_BUCKET_ELEMENTS, n_trainable))
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
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if bf16 and engine.zero:
        # Micro-steps add up in float32, so that their number does not change the gradient.
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(ours, user_deepspeed(engine))


def start_engine(module: nn.Module, groups: list[dict[str, Any]], config: StageConfig) -> deepspeed.DeepSpeedEngine:
    """Wraps a module, whose parameters in `groups` AdamW trains. The module is moved to the device."""
    n_trainable = sum(parameter.numel() for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, fused=True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, n_trainable))
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _forget_first_step(engine.optimizer)
    return engine


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


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | float:
    """Takes the optimizer step; returns the norm of the whole gradient before clipping."""
    norm = None
    if not engine.zero_optimization():  # DeepSpeed keeps no norm there
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
