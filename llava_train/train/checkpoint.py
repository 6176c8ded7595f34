"""Saves checkpoints: complete with a manifest, or ignored. Frozen parts are left out.

    checkpoints/.step-00000500.saving/   where all ranks write; left behind by a run that was killed meanwhile
    checkpoints/step-00000500/           its name once it is complete
    checkpoints/step-00000500/COMPLETE   the manifest: step, ranks, ZeRO stage, and size and checksum of every file

In order: rank 0 looks whether there is room, every rank writes its share to disk, all ranks tell what they wrote,
rank 0 writes the manifest to disk, renames the folder, and only then deletes what `keep` leaves out. Killed at any
point, a run finds either the new checkpoint whole or the old ones untouched.

The step is all that a run needs beside tensors: data order, learning rate and seeds are functions of it. `Window`
(loop) adds its sums over the steps since the last line of metrics.jsonl, so that the next line is whole too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch

from llava_train.errors import UserError
from llava_train.files import FileFacts, read_manifest, rename_durably, write_manifest
from llava_train.train.checkpoint_files import DurableFiles
from llava_train.train.world import World

CHECKPOINTS_FOLDER = "checkpoints"
_PATIENCE = 3.0
"""Storage that everybody writes to at once may stand still for a while."""
_Told = tuple[dict[str, FileFacts], str | None]
"""The files that a rank wrote, and why it could not write one."""
_BYTES_A_PARAMETER = 16
"""Of a trainable parameter in a checkpoint, at most: its value twice (training dtype, float32) and two moments."""


class HarmedError(UserError):
    """The weights are not finite any more: there is nothing worth saving."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        facts: what the manifest of each says beside the step and its files.
        keep: how many complete ones to keep.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, world: World, folder: Path, keep: int, facts: dict[str, Any]
    ) -> None:
        self.engine, self.world, self.folder, self.keep = engine, world, folder, keep
        self.facts = facts
        self.saved_step: int | None = None
        """Of the newest checkpoint that this process saved or continued."""

    def save(self, step: int, window: dict[str, Any]) -> None:
        """Saves the state after `step` optimizer steps; says so when that fails, and training goes on.

        Every rank must call it.

        Raises:
            HarmedError: the weights are not finite.
        """
        if step == self.saved_step:
            return
        self.world.beat(f"saving the checkpoint of step {step}", patience=_PATIENCE)
        self.refuse_harmed(step)
        started = time.perf_counter()
        problem = self.world.on_main(lambda: self._prepare(step)) or self._write(step, window)
        if problem is None:
            self.saved_step = step
            manifest = read_manifest(checkpoint_path(self.folder, step))
            size, took_s = _bytes_of(manifest) / 1e6, time.perf_counter() - started
            self.world.say(f"step {step}: checkpoint of {size:,.1f} MB saved in {took_s:.1f} s")
        else:
            self.world.say(f"warning: no checkpoint of step {step}: {problem}. Training goes on; earlier ones are kept")

    def go_on_from(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: deletes what a kill left. Every rank must call it."""
        self.saved_step = step

        def tidy_up() -> None:
            remove_unfinished(self.folder)
            self._delete_old(step)

        self.world.on_main(tidy_up)

    def refuse_harmed(self, step: int) -> None:
        """Raises HarmedError when the weights of any rank are not finite. Every rank must call it."""
        if any(self.world.gather(not is_finite(self.engine))):
            raise HarmedError(
                f"step {step}: trained weights are not finite (inf or nan), so nothing is saved; the same command goes "
                "on from the newest checkpoint, and a lower learning rate or a look at the data may help"
            )

    def _write(self, step: int, window: dict[str, Any]) -> str | None:
        """Every rank writes its share, rank 0 completes it. Returns why that failed."""
        files = self.engine.checkpoint_engine
        assert isinstance(files, DurableFiles)
        files.start(self.world.touch)
        name = _unfinished(self.folder, step).name
        self.engine.save_checkpoint(str(self.folder), tag=name, save_latest=False, exclude_frozen_parameters=True)
        told = self.world.gather((files.written, files.failure))
        return self.world.on_main(lambda: self._complete(step, window, told))

    def _prepare(self, step: int) -> str | None:
        """Makes an empty folder to write to, if there is room. Returns why it cannot."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            free, needed = shutil.disk_usage(self.folder).free, self._expected_bytes()
            if free < needed:
                return f"{self.folder} has {free / 1e9:.2f} GB left, and it takes about {needed / 1e9:.2f} GB"
            _unfinished(self.folder, step).mkdir()
        except OSError as error:
            return f"cannot write to {self.folder}: {error.strerror}"
        return None

    def _complete(self, step: int, window: dict[str, Any], told: list[_Told]) -> str | None:
        """Declares what all ranks wrote a checkpoint, and deletes the oldest. Returns why it cannot."""
        written, target = _unfinished(self.folder, step), checkpoint_path(self.folder, step)
        try:
            failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(told) if failure]
            files = {name: facts for of_rank, _ in told for name, facts in of_rank.items()}
            failures += list(_missing(written, files))
            if failures:
                remove_unfinished(self.folder)
                return "; ".join(failures)
            write_manifest(written, files, step=step, **self.facts, window=window)
            forget(target)  # one that was found damaged
            rename_durably(written, target)
        except OSError as error:
            remove_unfinished(self.folder)
            return f"cannot complete {target}: {error.strerror}"
        self._delete_old(step)
        return None

    def _delete_old(self, step: int) -> None:
        """Deletes what `keep` leaves out beside the checkpoint of `step`."""
        for old in older(self.folder, step)[self.keep - 1 :]:
            try:
                forget(old)
            except OSError as error:
                self.world.say(f"warning: cannot delete {old}: {error.strerror}")

    def _expected_bytes(self) -> int:
        """About the size of the next checkpoint."""
        for path in complete_checkpoints(self.folder):
            return _bytes_of(read_manifest(path))
        n_trainable = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in _trained(self.engine))
        return n_trainable * _BYTES_A_PARAMETER


def _bytes_of(manifest: dict[str, Any] | None) -> int:
    return sum(facts["n_bytes"] for facts in manifest["files"].values()) if manifest else 0


def is_finite(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the trained weights of this rank are finite; under ZeRO 3 its share of them."""
    own = [_own_share(parameter) for parameter in _trained(engine)]
    return not own or bool(torch.stack([tensor.isfinite().all() for tensor in own]).all())


def _own_share(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter, without the padding of ZeRO 3, which nobody ever fills."""
    share = getattr(parameter, "ds_tensor", None)
    if share is None:
        return parameter.detach()
    n_left = cast(Any, parameter).ds_numel - torch.distributed.get_rank() * share.numel()
    return share.detach().view(-1)[: max(0, n_left)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, newest first. Their files are not read."""
    return [path for path in all_checkpoints(folder) if read_manifest(path) is not None]


def all_checkpoints(folder: Path) -> list[Path]:
    """Complete or not, newest first. Copies that somebody made under other names are none."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"), reverse=True)


def older(folder: Path, step: int) -> list[Path]:
    """The complete checkpoints before `step`, newest first."""
    return [path for path in complete_checkpoints(folder) if path.name < checkpoint_path(folder, step).name]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def forget(checkpoint: Path) -> None:
    """Deletes a checkpoint: under a name that `remove_unfinished` knows, should a kill leave half of it."""
    if checkpoint.exists():
        removed = checkpoint.with_name(f".{checkpoint.name}.removed")
        rename_durably(checkpoint, removed)
        shutil.rmtree(removed)


def remove_unfinished(folder: Path) -> None:
    """Deletes what a run that was killed, or whose disk was full, left of a checkpoint. It raises nothing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)  # it shall not keep the next one from being written


def _unfinished(folder: Path, step: int) -> Path:
    return folder / f".{checkpoint_path(folder, step).name}.saving"


def _missing(folder: Path, files: dict[str, FileFacts]) -> Iterator[str]:
    """Says which files are not where rank 0 sees them: every node must write to the same storage."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{path} was written on another machine and is not here: `output` must be on storage that all share"
        elif path.stat().st_size != facts["n_bytes"]:
            yield f"{path} has {path.stat().st_size} bytes, not {facts['n_bytes']}"


def _trained(engine: deepspeed.DeepSpeedEngine) -> list[torch.nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
