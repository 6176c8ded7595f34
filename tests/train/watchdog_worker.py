"""One rank of a job that trains nothing: it does what its script says under a watchdog.

    python -m tests.train.watchdog_worker TIMEOUT_S '[[["beat", "step 1"], ["hang"]], [["beat", "step 1"], ["die"]]]'

One script a rank, each a list of deeds. The ranks share files in the working directory: through them they wait for each
other, so that what happens first doesn't depend on how fast they are.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from llava_train.train.hang import Verdict
from llava_train.train.watchdog import Watchdog


class CountingWatchdog(Watchdog):
    """Knows how often it has reported."""

    n_reports = 0

    def _tick(self, lived_s: float) -> Verdict | None:
        verdict = super()._tick(lived_s)
        self.n_reports += 1
        return verdict


def share_port(port: int | None) -> int:
    path = Path("port")
    if port is not None:
        Path("port.part").write_text(str(port))
        Path("port.part").rename(path)
    wait_for_file(path)
    return int(path.read_text())


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def report(watchdog: CountingWatchdog) -> None:
    """Waits until the watchdog has reported the current activity: a report that it is in may still name the one before."""
    enough = watchdog.n_reports + 2
    while watchdog.n_reports < enough:
        time.sleep(0.02)


def meet(name: str) -> None:
    """Waits until every rank has come here."""
    Path(f"{name}-{rank}").touch()
    for other in range(n_ranks):
        wait_for_file(Path(f"{name}-{other}"))


def settle(watchdog: CountingWatchdog) -> None:
    """Waits until every rank knows the activity of rank 0, and rank 0 that of every rank."""
    for name in ("told", "heard"):
        report(watchdog)
        meet(name)


def loop_for_ever() -> None:
    while True:
        pass


def do(watchdog: CountingWatchdog, deed: str, *arguments) -> None:
    if deed == "beat":
        watchdog.beat(*arguments)
    elif deed == "report":
        report(watchdog)
    elif deed == "settle":
        settle(watchdog)
    elif deed == "wait for":
        wait_for_file(Path(*arguments))
    elif deed == "hang":  # as in a collective: without an end, and without the lock of the interpreter
        threading.Event().wait()
    elif deed == "loop":
        loop_for_ever()
    elif deed == "fill stderr":
        while True:
            os.write(2, b"x" * 4096)
    elif deed == "fail":
        raise KeyError(*arguments)
    else:
        os.kill(os.getpid(), {"freeze": signal.SIGSTOP, "die": signal.SIGKILL}[deed])


if __name__ == "__main__":
    rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meet("here")
    with CountingWatchdog(rank, n_ranks, os.environ["MASTER_ADDR"], share_port, float(sys.argv[1])) as guard:
        for what in json.loads(sys.argv[2])[rank]:
            do(guard, *what)
    Path(f"left-{rank}").touch()
