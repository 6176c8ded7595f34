"""Failures between the processes of a run: how they find each other, and lose each other."""

from __future__ import annotations

import errno
import os
import re

from llava_train.errors import OtherRankFailed
from llava_train.failures.words import WIDEST, Context, Explain, Explanation, first_lines, is_a

_LOST = (
    "ncclRemoteError|prematurely|aborted|failed to recv|[Cc]onnection (reset|closed)|Broken pipe|"
    "collective operation timeout"
)
"""What torch says of a rank that went away."""


def of_other_rank(error: BaseException, context: Context) -> Explanation | None:
    if isinstance(error, OtherRankFailed):
        return Explanation(str(error), (), by_another_rank=True)
    by_gloo = isinstance(error, RuntimeError) and "gloo/transport/" in str(error)
    by_torch = is_a(error, "torch.distributed.DistError") and re.search(_LOST, str(error))
    if context.n_ranks == 1 or not (by_gloo or by_torch):
        return None
    what = "the connection to another rank broke, which failed or was ended: see what it says"
    return Explanation(what, (), by_another_rank=True)


def _nccl(error: BaseException, context: Context) -> Explanation | None:
    if not is_a(error, "torch.distributed.DistBackendError"):
        return None
    return Explanation(
        f"the GPUs of this run cannot talk to each other{context.during}",
        (
            f"NCCL says: {first_lines(error, 1)[: WIDEST - 40]}",
            "Start again with NCCL_DEBUG=INFO, which tells why. Often NCCL_SOCKET_IFNAME has to name the interface",
            "that the nodes share, or a container needs --ipc=host --ulimit memlock=-1 --shm-size=16g.",
        ),
    )


def _port(error: BaseException, context: Context) -> Explanation | None:
    by_torch = is_a(error, "torch.distributed.DistNetworkError") and "EADDRINUSE" in str(error)
    if not (by_torch or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE)):
        return None
    found = re.search(r"port: (\d+)", str(error))
    port = found[1] if found else os.environ.get("MASTER_PORT", "")
    return Explanation(
        f"the port {port} is in use".replace("  ", " ") + ", where the processes of this run would meet",
        (
            "Another run of this machine has it, or what is left of one: `ss -ltnp` shows which process.",
            "Give this run another: torchrun --standalone ..., or --master_port 29555 after torchrun or deepspeed.",
        ),
    )


def _rendezvous(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    absent = re.search(r"after (\d+) seconds waiting for clients\. (\d+)/(\d+) clients joined", said)
    deaf = re.search(r"timed out after (\d+)ms while trying to connect to \((.+), (\d+)\)", said)
    if absent and is_a(error, "torch.distributed.DistStoreError"):
        what = f"{absent[2]} of the run's {absent[3]} processes came, and no more in {absent[1]} s"
    elif deaf and is_a(error, "torch.distributed.DistNetworkError"):
        what = f"rank 0 of the run did not answer at {deaf[2]}:{deaf[3]} in {int(deaf[1]) // 1000} s"
    elif is_a(error, "torch.distributed.elastic.rendezvous.api.RendezvousError"):
        what = f"the agents of torchrun did not meet ({type(error).__name__})"
    else:
        return None
    return Explanation(
        what,
        (
            "Start the same command on every node, with the same --nnodes, --nproc_per_node and address of the first,",
            "and look there for a process that ended early. Nothing may block the nodes' way to that address: set",
            "NCCL_SOCKET_IFNAME to the interface that they share, and MASTER_ADDR to the first one's address on it.",
        ),
    )


def _unread(error: BaseException, context: Context) -> Explanation | None:
    if not (isinstance(error, BrokenPipeError) and context.is_run):
        return None
    return Explanation(
        f"a pipe broke{context.during}: nobody reads any more what this run prints",
        ("Send it to a file, as by `... > log.txt 2>&1 &`, and look at that by `tail -f log.txt`.",),
    )


KNOWN: tuple[Explain, ...] = (_unread, _port, _rendezvous, _nccl)
