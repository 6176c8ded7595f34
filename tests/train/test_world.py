from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from torch import distributed

from llava_train.errors import UserError
from llava_train.train import assembly, world
from llava_train.train.assembly import check_devices
from llava_train.train.session import Session
from llava_train.train.stage import run_stage
from llava_train.train.world import World, said_after, start_distributed
from tests.tiny import stage
from tests.train.helpers import TRAIN, run_ranks, write_samples, write_stage


def test_a_wait_is_told_when_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    with said_after(0.01, "waits"):
        while "waits" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().out
    for wait_s in (9999.0, None):
        with said_after(wait_s, "waits longer"):
            time.sleep(0.05)
    assert said + capsys.readouterr().out == "waits\n"


def test_a_file_that_rank_0_cannot_write_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/none/file: No such file or directory"):
        World(0, 1, torch.device("cpu")).on_main(lambda: (tmp_path / "none/file").write_text(""))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_start_tries_no_operator_of_deepspeed_and_sets_the_allocator_before_cuda(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device() -> torch.device:
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        return torch.device(kind)

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    tried: list[str] = []
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: tried.append("all") or {})
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(world, "training_device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    assert start_distributed().device.type == kind
    if kind == "cpu":
        assert build_shm_op() is None, "what DeepSpeed asks when it joins processes on CPUs"
    assert tried == []


class Ranks(World):
    """Rank 0 of two, the other of which has an old GPU."""

    def gather(self, value: Any) -> list[Any]:
        return [value, "Tesla T4 (compute capability 7.5)"]


@pytest.mark.parametrize(
    ("lora", "remedy"), [(None, "set it to fp32, or"), ({"quantize_base": "nf4"}, "quantize_base")]
)
def test_bf16_on_a_gpu_older_than_ampere_is_refused_before_anything_is_read(
    lora: dict[str, Any] | None, remedy: str, tmp_path: Path
) -> None:
    language_model = {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4, **lora}} if lora else {"lr": 1e-3}
    trainable = {"projector": {"lr": 1e-3}, "language_model": language_model}
    config = stage(tmp_path / "none.json", engine={"precision": "bf16"}, trainable=trainable, output=str(tmp_path))
    words = rf"engine.precision: bf16 needs a GPU .* here is Tesla T4 \(compute capability 7.5\); .*{remedy}"
    with pytest.raises(UserError, match=words):
        run_stage(config, Session(Ranks(0, 1, torch.device("cpu"))))
    check_devices(stage(tmp_path / "none.json", engine={"precision": "fp32"}), Ranks(0, 1, torch.device("cpu")))


def test_a_rank_asks_its_own_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(assembly, "without_bf16_attention", lambda device: asked.append(device))
    device = torch.device("cuda", 3)
    check_devices(stage(tmp_path / "none.json", engine={"precision": "bf16"}), World(0, 1, device))
    assert asked == [device]


@pytest.mark.parametrize(
    ("kinds", "stopped", "code", "left"),
    [("itti", False, 0, "False"), ("itti", True, 85, "False"), ("itri", False, 2, "True")],
)
def test_process_groups_are_destroyed_after_a_clean_end_alone(
    kinds: str, stopped: bool, code: int, left: str, tmp_path: Path
) -> None:
    """After a failure, a rank that destroys them may wait for those that hang."""
    write_samples(tmp_path / "data.json", kinds)
    write_stage(tmp_path / "stage.yaml", on_bad_sample="error")
    stop = ["--stop-file", "stop"] if stopped else []
    (tmp_path / "stop").touch()
    worker = ["-m", "tests.train.ending_rank", TRAIN, "--config", "stage.yaml", *stop]
    ended = run_ranks(worker, tmp_path, n_ranks=2)
    assert ended.codes == [code] * 2, ended.stderr
    assert [(tmp_path / f"groups-{rank}").read_text() for rank in (0, 1)] == [left] * 2
