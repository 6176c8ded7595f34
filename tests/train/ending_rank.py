"""Runs `python ARGUMENTS` and writes, at the process's end, whether process groups are left, to `groups-RANK`.

python -m tests.train.ending_rank FILE [ARGUMENT ...], or -m tests.train.ending_rank -m MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from pathlib import Path

from torch import distributed


def _write() -> None:
    Path(f"groups-{os.environ['RANK']}").write_text(str(distributed.is_initialized()))


if __name__ == "__main__":
    atexit.register(_write)  # functions run in reverse order: this one last
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
