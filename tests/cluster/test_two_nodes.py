"""Training on two nodes with a network of their own: each is lost once, the other ends by itself, and both go on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import Node, NodesUnavailable, start_nodes
from tests.train.helpers import ROOT, TIMEOUT_S, read_lines, write_samples, write_stage

pytestmark = pytest.mark.cluster

N_STEPS, EVERY = 24, 4
WORKER = ROOT / "tests/train/fault_rank.py"
LOST_AFTER = {0: 5, 1: 17}
"""By node, so many steps; node 0 has rank 0 and torchrun's meeting point."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    try:
        with start_nodes() as started:
            yield started
    except NodesUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that both nodes see."""
    folder = tmp_path_factory.mktemp("nodes")
    write_samples(folder / "data.json", "itimtittiitmi")
    write_stage(
        folder / "tiny.yaml",
        engine={"zero": 2, "precision": "fp32"},
        schedule={"max_steps": N_STEPS, "epochs": 99},
        checkpoint={"every": EVERY},
    )
    return folder


def start(nodes: tuple[Node, Node], folder: Path, output: str, faults: dict[int, Any] | None = None) -> Path:
    """Starts one rank a node by torchrun, with faults (`fault_rank`) by rank; returns the run's metrics.jsonl."""
    host = nodes[0]
    for node in nodes:
        launcher = [sys.executable, ROOT / "scripts/torchrun.py", "--nnodes=2", "--nproc-per-node=1"]
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={host.address}:29400", f"--local-addr={node.address}"]
        launcher += [*meeting, f"--rdzv-conf=is_host={int(node is host)}"]
        command = [*launcher, WORKER, json.dumps(faults or {}), "--config", "tiny.yaml", "--set", f"output={output}"]
        node.start(command, folder, folder / f"{output}-{node.address}.log")
    return folder / output / "tiny/metrics.jsonl"


def finish(nodes: tuple[Node, Node]) -> None:
    for node in nodes:
        assert node.wait(TIMEOUT_S) == 0, node.log.read_text()


def train_until(step: int, waiting: int, nodes: tuple[Node, Node], folder: Path, output: str) -> None:
    """Trains until so many steps are done and a node waits before the next one, the other one for that."""
    metrics = start(nodes, folder, output, {waiting: [["pause", {"step": step + 1, "until": "never"}]]})
    deadline = time.monotonic() + TIMEOUT_S
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        for node in nodes:
            assert node.process is not None and node.process.poll() is None, node.log.read_text()
        assert time.monotonic() < deadline, nodes[0].log.read_text()
        time.sleep(0.01)


def losses(folder: Path, output: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / output / "tiny/metrics.jsonl")]


def test_a_lost_node_ends_the_other_and_the_same_command_goes_on(nodes: tuple[Node, Node], shared: Path) -> None:
    for lost, step in LOST_AFTER.items():
        train_until(step, lost, nodes, shared, "interrupted")
        nodes[lost].kill()
        other = nodes[1 - lost]
        assert other.wait(TIMEOUT_S) not in (0, 85), other.log.read_text()
        assert len(losses(shared, "interrupted")) == step
    for output in ("interrupted", "straight"):
        start(nodes, shared, output)
        finish(nodes)
    assert nodes[0].log.with_name(f"interrupted-{nodes[0].address}.log").read_text().count("resuming after step") == 2
    assert [step for step, _ in losses(shared, "straight")] == list(range(1, N_STEPS + 1))
    assert losses(shared, "interrupted") == losses(shared, "straight")
