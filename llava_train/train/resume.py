"""Continues a run: the newest checkpoint that is whole, converted when the world has changed.

DeepSpeed's own files are cut by rank and differ by ZeRO stage. A run on other ranks, or with another ZeRO stage,
therefore converts its checkpoint into DeepSpeed's universal format first, beside the others, and deletes that again
when it is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch

from llava_train.config import EngineSection
from llava_train.errors import UserError
from llava_train.failures.weights import first_misfit
from llava_train.files import damage, read_manifest
from llava_train.train.checkpoint import all_checkpoints, remove_unfinished
from llava_train.train.world import World


class CheckpointError(UserError):
    """A checkpoint that this run cannot continue."""

    keeps_traceback = True


class ConverterError(RuntimeError):
    """DeepSpeed's converter failed; what it printed."""


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on."""

    checkpoint: Path | None = None
    """None starts from the beginning."""
    manifest: dict[str, Any] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    """A line for each newer checkpoint that is not used, with the reason."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest.get("step", 0))

    def conversion(self, n_ranks: int, zero: int) -> str | None:
        """What has changed so that the checkpoint must be converted, in words; None when it loads as it is."""
        if self.checkpoint is None or zero == 0:
            return None
        before, now = (self.manifest["n_ranks"], self.manifest["zero"]), (n_ranks, zero)
        return None if before == now else f"{_in_words(*before)} saved it, this run has {_in_words(*now)}"


def find_resumption(world: World, folder: Path, engine: EngineSection) -> Resumption:
    """The newest whole checkpoint of a run. The ranks divide the work of reading it.

    Every rank must call it, before the engine is started.

    Raises:
        CheckpointError: it was saved in another precision, or with ZeRO where there is none now, or the reverse; or
            there are checkpoints, and none is whole.
    """
    passed_over: list[str] = []
    for path in world.on_main(lambda: all_checkpoints(folder)):
        reasons = [reason for reason in world.gather(damage(path, slice(world.rank, None, world.n_ranks))) if reason]
        if not reasons:
            manifest = read_manifest(path)
            assert manifest is not None
            _refuse(path, manifest, engine)
            return Resumption(path, manifest, tuple(passed_over))
        passed_over.append(f"{path}: {reasons[0]}")
    if passed_over:
        listed = "\n  ".join(passed_over)
        raise CheckpointError(
            f"no checkpoint of this run can be used:\n  {listed}\n"
            f"Bring one back, or move {folder.parent} away to begin anew"
        )
    return Resumption()


def load(engine: deepspeed.DeepSpeedEngine, world: World, resumption: Resumption) -> None:
    """Loads weights and optimizer state. Every rank must call it."""
    assert resumption.checkpoint is not None
    folder, zero = resumption.checkpoint, engine.zero_optimization_stage()
    changed = resumption.conversion(world.n_ranks, zero)
    if changed:
        folder = _universal(folder)
        world.on_main(lambda: _convert(resumption, folder, zero, world.touch))
    # DeepSpeed would also bring back the learning rates, decay and clipping of then; ZeRO 3 those of the first group,
    # for all.
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    try:
        engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_lr_scheduler_states=False
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise _misfit(resumption.checkpoint, error) from error
    for group, of_group in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(of_group)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    if changed:
        _separate_steps(engine.optimizer.optimizer)
        world.barrier()
        world.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))


def _separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter a step of its own, on the parameter's device, after a load in the universal format.

    DeepSpeed reads the step to the CPU, and ZeRO 3 gives one tensor to all parameters. Fused AdamW wants all tensors of
    a parameter on one device (pytorch #111123), and would count up a shared step once for each parameter.
    """
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device, copy=True)


def _misfit(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} does not fit this run: {first_misfit(error)}\n"
        "Train the parts that it was saved with, from the same files, or give the run another name to begin anew"
    )


def _convert(resumption: Resumption, target: Path, zero: int, on_progress: Callable[[], None]) -> None:
    """Writes the checkpoint in the universal format. Raises CheckpointError."""
    assert resumption.checkpoint is not None
    remove_unfinished(target.parent)
    command = [sys.executable, "-m", "llava_train.train.checkpoint_files", str(resumption.checkpoint), str(target)]
    # In a session of its own: signals to this rank's group ask the run to stop, not the converter.
    with tempfile.TemporaryFile("w+") as said:
        converter = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        while converter.poll() is None:
            on_progress()
            with suppress(subprocess.TimeoutExpired):
                converter.wait(timeout=1)
        said.seek(0)
        words = said.read()
    if converter.returncode:
        raise CheckpointError(
            f"{resumption.checkpoint} cannot be converted for this number of ranks and ZeRO stage; start the run as it "
            f"was ({_in_words(resumption.manifest['n_ranks'], resumption.manifest['zero'])})"
        ) from ConverterError(words)
    # The state that all ranks share has another name in each of DeepSpeed's layouts.
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero == 3 else "mp_rank_00_model_states.pt"
    if not (target / name).exists():
        next(target.glob("*model_states.pt")).rename(target / name)


def _refuse(path: Path, manifest: dict[str, Any], engine: EngineSection) -> None:
    """Raises CheckpointError for what no conversion changes."""
    now = {"precision": engine.precision, "zero": engine.zero}
    for key, value in now.items():
        saved = manifest[key]
        if saved != value and (key == "precision" or 0 in (saved, value)):
            raise CheckpointError(
                f"{path} was saved with engine.{key}: {saved}, this run has {value}; "
                f"go on with --set engine.{key}={saved}, or give the run another name"
            )


def _universal(checkpoint: Path) -> Path:
    """A name that `remove_unfinished` knows."""
    return checkpoint.with_name(f".{checkpoint.name}.universal")


def _in_words(n_ranks: int, zero: int) -> str:
    return f"{n_ranks} rank{'s' if n_ranks > 1 else ''} with ZeRO {zero}"
