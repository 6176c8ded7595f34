"""`torchrun`, but with an exit code that tells why the ranks ended.

torchrun itself exits with 1 whatever its ranks said, so that a job script could not tell a run that saved its state
and wants to go on (85) from one that failed.
"""

import os
import signal
import sys
import threading
import time

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

PREEMPTED = 85
"""The exit code of `scripts/train.py` after it was asked to stop and has saved its state."""

OUTLIVES_RANKS_S = 60


def exit_code(failures: list[ProcessFailure]) -> int:
    """PREEMPTED when every failed rank said so, else the code of the first that said more; 128 + n after signal n.

    torchrun ends the other ranks of a node by SIGTERM as soon as one has exited, so those have no word of their own.
    """
    by_torchrun = (-signal.SIGTERM, 128 + signal.SIGTERM)
    own = [failure for failure in failures if failure.exitcode not in by_torchrun] or failures
    failed = [failure for failure in own if failure.exitcode != PREEMPTED]
    if not failed:
        return PREEMPTED
    first = min(failed, key=lambda failure: failure.timestamp).exitcode
    return first if first > 0 else 128 - first


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def leave_with_ranks() -> None:
    """Ends this process a while after the last of its ranks.

    torchrun then still talks to the host of the rendezvous, and when that has vanished it does so for ever.
    """
    had_ranks, last_seen = False, time.monotonic()
    while True:
        time.sleep(1)
        if any(is_running(child) for child in psutil.Process().children()):
            had_ranks, last_seen = True, time.monotonic()
        elif had_ranks and time.monotonic() - last_seen > OUTLIVES_RANKS_S:
            print("torchrun: all ranks have ended, and the host of the rendezvous does not answer", file=sys.stderr)
            os._exit(1)


def main() -> int:
    # Schedulers send it to every process of a step. Ranks hear it; torchrun would die of it and leave them alone.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=leave_with_ranks, daemon=True).start()
    try:
        run.main()
    except ChildFailedError as error:
        code = exit_code(list(error.failures.values()))
        if code != PREEMPTED:
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
