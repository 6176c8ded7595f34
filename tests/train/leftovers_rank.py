"""Trains stages with `llava_train.cli.run` and prints, as JSON, what DeepSpeed left behind in the process.

python -m tests.train.leftovers_rank STAGE [STAGE ...]
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch

from llava_train.cli import run
from llava_train.train import stage

_LINEAR = torch.nn.functional.linear


def left_behind() -> dict[str, object]:
    engines = sum(isinstance(thing, deepspeed.DeepSpeedEngine) for thing in gc.get_objects())
    return {"engines": engines, "linear_is_torchs": torch.nn.functional.linear is _LINEAR}


if __name__ == "__main__":
    found = []
    write_result = stage.write_result
    stage.write_result = lambda *arguments: (found.append(left_behind()), write_result(*arguments))
    code = run([Path(path) for path in sys.argv[1:]], [])
    Path("left.json").write_text(json.dumps(found))
    raise SystemExit(code)
