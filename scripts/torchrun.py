"""`torchrun`, but with an exit code that tells why the ranks ended.

torchrun itself exits with 1 whatever its ranks said, so that a job script could not tell a run that saved its state
and wants to go on (85) from one that failed.
"""

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

PREEMPTED = 85
"""The exit code of `scripts/train.py` after it was asked to stop and has saved its state."""


def exit_code(failures: list[ProcessFailure]) -> int:
    """PREEMPTED when every failed rank said so, else the code of the first that said more; 128 + n after signal n.

    torchrun ends the other ranks of a node by SIGTERM as soon as one has exited, so those have no word of their own.
    """
    own = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or failures
    failed = [failure for failure in own if failure.exitcode != PREEMPTED]
    if not failed:
        return PREEMPTED
    first = min(failed, key=lambda failure: failure.timestamp).exitcode
    return first if first > 0 else 128 - first


def main() -> int:
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
