"""The files of a checkpoint, as DeepSpeed hands them over and wants them back.

DeepSpeed gathers, cuts and names the state; `DurableFiles` puts it on disk. It differs from DeepSpeed's own writer:

- when `save` returns, the file is on disk, and its size and checksum are known without reading it again;
- a file that cannot be written ends the checkpoint, not the training: DeepSpeed synchronises its ranks while it
  saves, so that an exception on one of them would leave the others waiting. The failure is told afterwards;
- files are read as data, never as code: `torch.load(weights_only=True)` and the three classes of DeepSpeed below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import deepspeed
import torch
from deepspeed.checkpoint import DS_VERSION, FP32_WEIGHT_KEY, OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS, PARAM_SHAPES
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from llava_train.files import ChecksummedFile, FileFacts

SAFE_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files hold beside tensors and plain data. None of them does anything when it is made."""


class DurableFiles(TorchCheckpointEngine):
    """Writes and reads the files of checkpoints for a DeepSpeed engine.

    Args:
        frozen: names of parameters to leave out. DeepSpeed leaves frozen ones out under one of their names only, and
            would write the embeddings of a language model whose output layer is tied to them.
    """

    def __init__(self, frozen: frozenset[str]) -> None:
        self.name, self.frozen = type(self).__name__, frozen
        self.written: dict[str, FileFacts] = {}
        """Size and checksum of each file since `start`, by name."""
        self.failure: str | None = None
        """Why a file since `start` could not be written."""

    def start(self, on_progress: Callable[[], None]) -> None:
        """Begins a checkpoint. `on_progress` is called at every piece that is written."""
        self.written, self.failure, self._on_progress = {}, None, on_progress

    def create(self, info: Any) -> None:
        """DeepSpeed announces a checkpoint. Its own writer would log here."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or f"cannot make {path}: {error.strerror}"

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.failure:
            return
        if isinstance(state_dict.get("module"), dict):
            module = {name: value for name, value in state_dict["module"].items() if name not in self.frozen}
            state_dict = {**state_dict, "module": module}
        try:
            with Path(path).open("wb") as file:
                watched = _Watched(file, self._on_progress)
                torch.save(state_dict, cast(IO[bytes], watched))
                watched.flush()
                os.fsync(file.fileno())
            self.written[Path(path).name] = watched.facts()
        except OSError as error:
            self.failure = f"cannot write {path}: {error.strerror}"
        except RuntimeError:  # torch's, about the file that it could not go on with
            if watched.error is None:
                raise
            self.failure = f"cannot write {path}: {watched.error.strerror}"

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=False)


class _Watched(ChecksummedFile):
    """Tells of its progress, and remembers the file system's error, which torch.save replaces by one of its own."""

    def __init__(self, file: BinaryIO, on_progress: Callable[[], None]) -> None:
        super().__init__(file)
        self._on_progress = on_progress
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._on_progress()
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def to_universal(checkpoint: Path, target: Path) -> None:
    """Converts a checkpoint into DeepSpeed's universal format, which any number of ranks and ZeRO stage can load.

    `python -m llava_train.train.checkpoint_files CHECKPOINT TARGET`: a process of its own, for DeepSpeed's converter
    loads every pickle it meets, so it runs where torch.load is told not to.
    """
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    folders = {"input_folder": str(checkpoint), "output_folder": str(target)}
    one_process = {"num_extract_workers": 1, "num_merge_workers": 1}
    with torch.serialization.safe_globals(SAFE_CLASSES):
        main(Namespace(**folders, **one_process, keep_temp_folder=False, strict=True, inject_missing_state=True))
        _fit_every_stage(target)
    (target.parent / "latest_universal").unlink()  # the converter's, for people who load by hand


def _fit_every_stage(universal: Path) -> None:
    """Adds what DeepSpeed's converter leaves out between ZeRO 3 and the others: each looks elsewhere for the step.

    And what ZeRO 3 wrote is flat, where the others want the shape of the parameter.
    """
    path = universal / "zero/optimizer_state.pt"
    state = torch.load(path)
    if OPTIMIZER_STATE_DICT in state:  # from ZeRO 3
        step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"]
        shapes = torch.load(next(universal.glob("*model_states.pt")))[PARAM_SHAPES]
        for name, shape in [item for group in shapes for item in group.items()]:
            for key in (FP32_WEIGHT_KEY, "exp_avg", "exp_avg_sq"):
                file = universal / "zero" / name / f"{key}.pt"
                torch.save({PARAM: torch.load(file).view(shape)}, file)
            torch.save(step, universal / "zero" / name / "step.pt")
        state[DS_VERSION] = deepspeed.__version__
    else:
        step = torch.load(next(universal.glob("zero/**/step.pt")))
        state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: state[PARAM_GROUPS]}
    torch.save(state, path)


if __name__ == "__main__":
    to_universal(Path(sys.argv[1]), Path(sys.argv[2]))
