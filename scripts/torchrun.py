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


def exit_code(first: ProcessFailure, all_: list[ProcessFailure]) -> int:
    """PREEMPTED when every rank said so, else the code of the rank that failed first; 128 + n after signal n.

    torchrun ends the other ranks of a node by SIGTERM as soon as one has exited, so those have no word of their own.
    """
    codes = {failure.exitcode for failure in all_}
    if PREEMPTED in codes and codes <= {PREEMPTED, -signal.SIGTERM}:
        return PREEMPTED
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def main() -> int:
    try:
        run.main()
    except ChildFailedError as error:
        code = exit_code(error.get_first_failure()[1], list(error.failures.values()))
        if code != PREEMPTED:
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
