from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from llava_train import devices
from llava_train.devices import pick_device, training_device, without_bf16_attention
from llava_train.errors import UserError

_FAULTS = """
import resource, sys, torch
from llava_train.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    kept = [torch.ones(n * 2**18) for n in (1, 3, 2, 4) * 8]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_step_gets_the_memory_again_that_the_step_before_freed() -> None:
    assert faults("keep") < faults("give back") / 3


def test_a_gpu_that_torch_cannot_use_is_refused_for_training_unless_it_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"CUDA cannot be used: [\s\S]*set CUDA_VISIBLE_DEVICES to nothing"):
        training_device()
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert training_device().type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "has_gpu", lambda: False)
    assert training_device().type == "cpu"


def test_a_device_that_is_asked_for_and_not_there_is_told_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        UserError, match=r"device cuda: torch sees no .*\s*CUDA cannot be used: CUDA_VISIBLE_DEVICES is ''"
    ):
        pick_device("cuda")
    too_old = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(too_old))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="the NVIDIA driver is too old for this PyTorch"):
        pick_device("cuda")


def test_a_gpu_older_than_ampere_has_no_attention_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, expected in {
        (7, 0): "Tesla T4 (compute capability 7.0)",
        (7, 5): "Tesla T4 (compute capability 7.5)",
        (8, 0): None,
        (8, 9): None,
        (9, 0): None,
        (12, 0): None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert without_bf16_attention(gpu) == expected
    assert without_bf16_attention(torch.device("cpu")) is None
