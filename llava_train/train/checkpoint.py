"""Checkpoints of a run: written by DeepSpeed, complete only with a manifest, frozen parts left out.

    checkpoints/step-00000500/     what DeepSpeed writes, every rank its share
    checkpoints/step-00000500/COMPLETE     sizes, checksums and the step; written last, after all ranks

The step is all that a run needs beside tensors: data order, learning rate and seeds are functions of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch

from llava_train.errors import UserError
from llava_train.files import MANIFEST, damage, read_manifest, write_manifest
from llava_train.train.engine import World


class CheckpointError(UserError):
    """A checkpoint that this run cannot continue."""


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, world: World, folder: Path, step: int, keep: int) -> Path:
    """Saves the state after `step` optimizer steps and deletes all but the newest `keep` complete ones.

    Every rank must call it.
    """
    target = checkpoint_path(folder, step)
    if world.is_main and target.exists():
        (target / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(target)
    torch.distributed.barrier()
    engine.save_checkpoint(str(folder), tag=target.name, save_latest=False, exclude_frozen_parameters=True)
    torch.distributed.barrier()
    if world.is_main:
        write_manifest(target, step=step, n_ranks=world.n_ranks, engine=_settings(engine))
        for old in complete_checkpoints(folder)[keep:]:
            (old / MANIFEST).unlink()  # first, so that a half-deleted folder is not taken for a checkpoint
            shutil.rmtree(old)
    torch.distributed.barrier()
    return target


def load_newest(engine: deepspeed.DeepSpeedEngine, world: World, folder: Path) -> tuple[int, list[str]]:
    """Loads the newest complete checkpoint.

    Returns:
        The number of optimizer steps done (0 when there is no checkpoint), and a line for each newer folder
        that was passed over.
    """
    found: list[tuple[Path | None, list[str]]] = [newest_complete(folder) if world.is_main else (None, [])]
    torch.distributed.broadcast_object_list(found, src=0)
    newest, passed_over = found[0]
    if newest is None:
        return 0, passed_over
    manifest = read_manifest(newest)
    assert manifest is not None
    for key, value in _settings(engine).items():
        if manifest["engine"][key] != value:
            raise CheckpointError(
                f"{newest} was saved with engine.{key}: {manifest['engine'][key]}, this run has {value}; "
                f"go on with --set engine.{key}={manifest['engine'][key]}, or give the run another name"
            )
    if manifest["n_ranks"] != world.n_ranks and engine.zero_optimization():
        raise CheckpointError(
            f"{newest} was saved by {manifest['n_ranks']} ranks, this run has {world.n_ranks}; "
            f"start it again on {manifest['n_ranks']}"
        )
    engine.load_checkpoint(str(folder), tag=newest.name, load_module_strict=False, load_lr_scheduler_states=False)
    return int(manifest["step"]), passed_over


def _settings(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What DeepSpeed's own files depend on, as keys of the stage file's `engine`."""
    return {"zero": engine.zero_optimization_stage(), "precision": "bf16" if engine.bfloat16_enabled() else "fp32"}


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as its manifest says, and why newer folders are not."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        reason = damage(path)
        if reason is None:
            return path, passed_over
        passed_over.append(f"{path}: {reason}")
    return None, passed_over


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, newest first. Their files are not read."""
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if read_manifest(path) is not None]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"
