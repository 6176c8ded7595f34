"""Programs, variables, disks and the hub, as the doctor sees them."""

from __future__ import annotations

import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_train.doctor import machine
from llava_train.doctor.findings import Level


class Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_secrets_are_told_only_as_set_or_not() -> None:
    variables = {
        "HF_TOKEN": "hf_secret",
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/data/hf",
        "AWS_SECRET": "x",
        "PATH": "/bin",
    }
    (finding,) = machine.environment(variables)
    assert finding.text == "HF_HOME=/data/hf, NCCL_DEBUG=INFO, HF_TOKEN is set, WANDB_API_KEY is not set"


def test_variables_that_a_launcher_left_are_a_warning() -> None:
    *_, finding = machine.environment({"RANK": "0", "WORLD_SIZE": "8"})
    assert (finding.level, finding.mend) == (Level.warning, "unset RANK WORLD_SIZE")


def test_a_launcher_of_another_python_is_a_warning(tmp_path: Path) -> None:
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "other" / "torchrun").chmod(0o755)
    missing, other, *rest = machine.tools(str(tmp_path / "other"))
    assert (missing.level, missing.text) == (Level.warning, "deepspeed is not on the PATH")
    assert other.level is Level.warning and f"of another Python than {sys.executable}" in other.text
    assert "on the PATH: torchrun" in [finding.text for finding in rest]
    assert any("no sbatch" in finding.text for finding in rest)


def test_little_space_and_little_shared_memory_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9, total=64e6))
    cache, here, shared = machine.disks()
    assert cache.level is here.level is shared.level is Level.warning
    assert "3 GB free; a 7B model takes 14 GB" in here.text
    assert "docker run --shm-size" in shared.mend


def test_the_cache_of_the_hub_is_where_its_variables_say() -> None:
    assert machine.hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert machine.hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
    assert machine.hub_cache({}) == Path("~/.cache/huggingface/hub").expanduser()


def test_a_hub_that_answers_is_reachable_whatever_it_says(refusing_hub: str) -> None:
    (finding,) = machine.hub({"HF_ENDPOINT": refusing_hub})
    assert (finding.level, finding.text) == (Level.ok, "127.0.0.1 answers")


def test_a_hub_that_is_silent_is_not_waited_for_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HUB_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (finding,) = machine.hub({"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"})
    assert finding.level is Level.note and "cannot be reached" in finding.text


def test_offline_is_told_and_nobody_is_asked() -> None:
    (finding,) = machine.hub({"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://user:pass@nowhere.invalid"})
    assert finding.level is Level.note and "HF_HUB_OFFLINE is set" in finding.text
