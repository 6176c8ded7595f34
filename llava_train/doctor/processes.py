"""Processes that the doctor starts: this Python, without what a launcher may have left in the environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llava_train.slurm import PACKAGE, REPO

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
"""Variables by which a process takes itself for one of several."""


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    code: int | None
    """None when it ran out of time."""
    output: str
    """What it wrote, errors too."""
    seconds: float

    @property
    def why(self) -> str:
        if self.code is None:
            return f"not done after {self.seconds:.0f} s"
        return f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


def run_python(module: str, arguments: list[str], timeout_s: float, cwd: Path | None = None) -> Ended:
    """Runs `python -m MODULE ARGUMENTS`, with this very package."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    if REPO != PACKAGE:  # a checkout need not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environment.get("PYTHONPATH")]))
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", "-X", "faulthandler", "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            output, _ = process.communicate()
            code = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Ended(code, output, time.monotonic() - started)
