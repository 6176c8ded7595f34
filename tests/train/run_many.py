"""Runs several `scripts/train.py` commands in one process; see `helpers.run_many`.

Beside the outcome of each command it writes what became of each parameter of the training engine, in
`changes.json` of the run's folder: a stage's result is built anew from its starting point, so it cannot tell.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlavaConfig

from llava_train.config import StageConfig
from llava_train.data.loader import StepBatch
from llava_train.train import memory, run_folder
from llava_train.train.loop import Loop
from tests.train.helpers import TRAIN

_train, _activation_bytes, _known = Loop.train, memory.activation_bytes, dict[str, int]()


def remembered_activation_bytes(config: StageConfig, llava: LlavaConfig, *pack: Any) -> int:
    """Estimated once for commands that differ in nothing it depends on: it takes as long as ten steps."""
    key = repr((config.trainable, config.engine.precision, llava.to_json_string(), pack))
    if key not in _known:
        _known[key] = _activation_bytes(config, llava, *pack)
    return _known[key]


def every_parameter(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Copies of all parameters, frozen ones too. Every rank must call it."""
    copies = {}
    for name, parameter in engine.module.llava.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            copies[name] = parameter.detach().clone()
    return copies


def watched_train(self: Loop, batches: Iterable[StepBatch]) -> None:
    before = every_parameter(self.engine)
    _train(self, batches)
    after = every_parameter(self.engine)
    changes = {
        name: {"trainable": parameter.requires_grad, "changed": not torch.equal(before[name], after[name])}
        for name, parameter in self.engine.module.llava.named_parameters()
    }
    if self.world.is_main:
        (self.config.run_dir / "changes.json").write_text(json.dumps(changes))


def run(arguments: list[str]) -> dict[str, Any]:
    sys.argv = [str(TRAIN), *arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


def main(watched: bool = True) -> None:
    run_folder._LOCK_PATIENCE_S = 0.0  # the commands before have let their folders go
    memory.activation_bytes = remembered_activation_bytes
    commands = Path(sys.argv[1])
    if watched:
        Loop.train = watched_train
    outcomes = {name: run(arguments) for name, arguments in json.loads(commands.read_text()).items()}
    (commands.parent / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
