"""`scripts/torchrun.py`: the exit code tells what became of the ranks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.scripts import ROOT, load_script
from tests.train.helpers import TIMEOUT_S, environment, free_port

torchrun = load_script("scripts/torchrun.py")

RANKS = {
    "all ranks finish": ("0", 0),
    "all ranks were preempted": ("85", 85),
    "one was preempted first, the other is slow to end": ("85 if rank == 1 else time.sleep(9999)", 85),
    "torchrun itself gets SIGUSR1": ("os.kill(os.getppid(), 10) or 85", 85),
    "one failed": ("3 if rank == 1 else time.sleep(9999)", 3),
    "one was killed": ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(9999)", 137),
}


@pytest.mark.parametrize("story", RANKS)
def test_torchrun_ends_with_the_exit_code_of_its_ranks(story: str, tmp_path: Path) -> None:
    exits, expected = RANKS[story]
    script = tmp_path / "ranks.py"
    script.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\nsys.exit({exits})\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/torchrun.py", "--nproc-per-node=2", f"--master-port={free_port()}", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    assert ("FAILED" in done.stderr) is (expected not in (0, 85))


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([85, 85], 85),
        ([85, -signal.SIGTERM], 85),
        ([85, 128 + signal.SIGTERM], 85),
        ([85, 1], 1),
        ([-signal.SIGTERM, 1], 1),
        ([-signal.SIGTERM, -signal.SIGTERM], 128 + signal.SIGTERM),
        ([-signal.SIGKILL, 85], 128 + signal.SIGKILL),
        ([2, 2], 2),
    ],
)
def test_preempted_means_that_no_rank_says_anything_else(codes: list[int], expected: int, tmp_path: Path) -> None:
    failures = [ProcessFailure(rank, 1, code, str(tmp_path / "none")) for rank, code in enumerate(codes)]
    assert torchrun.exit_code(failures) == expected


def test_torchrun_does_not_outlive_its_ranks_when_it_hangs() -> None:
    """As when the host of the rendezvous has vanished: torchrun then waits for it, and nothing ends that."""
    hangs = (
        "import subprocess, sys, threading, time; sys.path.insert(0, 'scripts'); import torchrun;"
        "torchrun.OUTLIVES_RANKS_S = 0; threading.Thread(target=torchrun.leave_with_ranks, daemon=True).start();"
        "rank = subprocess.Popen(['sleep', '1.5']); time.sleep(9999)"
    )
    done = subprocess.run(
        [sys.executable, "-c", hangs], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "all ranks have ended" in done.stderr


def test_a_port_that_is_taken_is_told_in_a_few_lines(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = [sys.executable, ROOT / "scripts/torchrun.py", "--nproc-per-node=2", f"--master-port={port}", "no.py"]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    assert done.returncode == 2
    lines = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert f"the port {port} is in use" in lines[0] and len(lines) <= 8 and "Traceback" not in done.stderr
