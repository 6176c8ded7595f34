"""One rank of a job that trains nothing: it does what its script says under a watchdog.

    python -m tests.train.watchdog_worker TIMEOUT_S '[[["beat", "step 1"], ["hang"]], [["beat", "step 1"], ["die"]]]'

One script a rank, each a list of deeds. Ranks share the port through a file.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from llava_train.train.watchdog import Watchdog


def share_port(port: int | None) -> int:
    path = Path("port")
    if port is not None:
        Path("port.part").write_text(str(port))
        Path("port.part").rename(path)
    while not path.exists():
        time.sleep(0.02)
    return int(path.read_text())


def loop_for_ever() -> None:
    while True:
        pass


def do(watchdog: Watchdog, deed: str, *arguments) -> None:
    if deed == "beat":
        watchdog.beat(*arguments)
    elif deed == "sleep":
        time.sleep(*arguments)
    elif deed == "touch":
        end = time.monotonic() + arguments[0]
        while time.monotonic() < end:
            watchdog.touch()
            time.sleep(0.05)
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
    with Watchdog(rank, n_ranks, os.environ["MASTER_ADDR"], share_port, float(sys.argv[1])) as watchdog:
        Path(f"started-{rank}").touch()
        for deed in json.loads(sys.argv[2])[rank]:
            do(watchdog, *deed)
