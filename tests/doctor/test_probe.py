"""Devices as the doctor sees them, through a process that may crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_train.doctor.findings import Finding, Level
from llava_train.doctor.probe import Probed, devices, probe
from llava_train.doctor.processes import Ended

GPU = {"name": "NVIDIA H100 80GB HBM3", "bytes": 80 * 2**30, "capability": [9, 0]}


def seen(gpus: list[dict[str, Any]], cuda: str | None, drivers: list[str]) -> list[Finding]:
    about = {"version": "2.13.0", "cuda": cuda, "devices": gpus, "cpu_bf16": True}
    return list(devices(Probed(about, {}), drivers))


def test_a_gpu_is_told_with_its_memory_capability_driver_and_torchs_build() -> None:
    gpu, cpu = seen([GPU], "13.0", ["580.95"])
    assert gpu.text == (
        "GPU 0: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0, driver 580.95; torch's build: CUDA 13.0"
    )
    assert (gpu.level, cpu.level) == (Level.ok, Level.ok)
    assert cpu.text.startswith("CPU: ")


def test_a_gpu_without_bf16_is_a_warning_that_names_the_key() -> None:
    gpu, _ = seen([{**GPU, "name": "Tesla V100", "capability": [7, 0]}], "12.6", ["550.1"])
    assert (gpu.level, gpu.mend) == (Level.warning, "set engine.precision: fp32")


def test_gpus_that_torch_cannot_use_are_broken_unless_they_were_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus, _ = seen([], None, ["580.95", "580.95"])
    assert gpus.level is Level.broken
    assert gpus.text == "nvidia-smi sees 2 GPUs (driver 580.95), torch's CPU build sees none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [finding.level for finding in seen([], None, ["580.95"])] == [Level.ok]


def test_a_torch_that_cannot_be_imported_is_broken() -> None:
    ended = Ended(1, "Traceback\nImportError: libcudnn.so.9: cannot open shared object file\n", 1.0)
    (finding,) = devices(Probed(None, {}, ended), [])
    assert finding.level is Level.broken and "libcudnn.so.9" in finding.text


def test_modules_that_raise_or_crash_are_told_and_the_doctor_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises.py").write_text("raise RuntimeError('built for another torch')")
    (tmp_path / "crashes.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probed = probe(["json", "raises", "crashes", "never"])
    assert probed.torch is not None and probed.torch["version"]
    assert probed.errors == {
        "json": None,
        "raises": "RuntimeError: built for another torch",
        "crashes": "the process that tried ended: signal SIGSEGV",
        "never": "the process that tried ended: signal SIGSEGV",
    }
