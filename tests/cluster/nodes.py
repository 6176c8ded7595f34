"""Two nodes on one machine: network namespaces that a cable (a veth pair) joins. They share the file system."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.train.helpers import environment

CABLE = "cable"
"""The name of the network interface in each node."""


class NodesUnavailable(Exception):
    """This machine cannot have network namespaces; the message says why."""


@dataclass
class Node:
    """A network namespace, and the command that runs in it."""

    name: str
    address: str
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(default_factory=Path)

    def start(self, command: Sequence[object], cwd: Path, log: Path) -> None:
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)],
                cwd=cwd,
                env=environment(GLOO_SOCKET_IFNAME=CABLE),
                stdout=out,
                stderr=out,
            )
        self.log = log

    def wait(self, timeout_s: float) -> int:
        """The exit code. Raises TimeoutExpired."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to every process of the node, as when it loses power."""
        while pids := _ip("netns", "pids", self.name).split():
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        if self.process is not None:
            self.process.wait()


@contextmanager
def start_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other and nothing else; with the block, they and their processes end.

    Raises:
        NodesUnavailable: not root, or no `ip`, or a kernel that does not let us.
    """
    if os.geteuid() != 0:
        raise NodesUnavailable("network namespaces need root")
    if shutil.which("ip") is None:
        raise NodesUnavailable("not installed: ip (apt-get install iproute2)")
    nodes = [Node(f"llava-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2)]
    first, second = nodes
    try:
        try:
            for node in nodes:
                _ip("netns", "add", node.name)
                _ip("-n", node.name, "link", "set", "lo", "up")
            ends = ["type", "veth", "peer", "name", CABLE, "netns", second.name]
            _ip("-n", first.name, "link", "add", CABLE, *ends)
            for node in nodes:
                _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", CABLE)
                _ip("-n", node.name, "link", "set", CABLE, "up")
        except subprocess.CalledProcessError as error:
            raise NodesUnavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield first, second
    finally:
        existing = _ip("netns", "list")
        for node in nodes:
            if node.name in existing:
                node.kill()
                _ip("netns", "delete", node.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
