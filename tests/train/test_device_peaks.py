from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from llava_train.train import device_peaks
from llava_train.train.device_peaks import _PEAKS, peak_flops, peak_flops_of

KNOWN = {  # in bf16
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA A10": 125,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA RTX 6000 Ada Generation": 364.25,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}


FLOAT32 = {
    "NVIDIA A100-SXM4-80GB": (156, 19.5),
    "NVIDIA H100 80GB HBM3": (494.7, 66.9),
    "NVIDIA H100 PCIe": (378, 51.2),
    "NVIDIA H200": (494.7, 67),
    "NVIDIA B200": (1100, 75),
    "NVIDIA GB200": (1250, 80),
    "NVIDIA L4": (60, 30.3),
    "NVIDIA L40": (90.5, 90.5),
    "NVIDIA L40S": (183, 91.6),
    "NVIDIA A10": (62.5, 31.2),
    "NVIDIA A40": (74.8, 37.4),
    "NVIDIA GeForce RTX 3090": (35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (82.6, 82.6),
    "NVIDIA GeForce RTX 5090": (104.8, 104.8),
    "AMD Instinct MI300X": (653.7, 163.4),
}
"""Of datasheets: dense TF32, and float32 without tensor cores."""


@pytest.mark.parametrize(("name", "tflops"), KNOWN.items())
def test_a_device_is_known_by_its_whole_name(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(("name", "peaks"), FLOAT32.items())
def test_float32_has_peaks_of_its_own(name: str, peaks: tuple[float, float]) -> None:
    tf32, fp32 = peaks
    assert peak_flops(name, "fp32") == pytest.approx(fp32 * 1e12)
    assert peak_flops(name, "tf32") == pytest.approx(tf32 * 1e12, rel=0.025)  # datasheets round it


def test_no_device_does_more_in_float32_than_in_bf16() -> None:
    for name in KNOWN:
        fp32, bf16 = peak_flops(name, "fp32"), peak_flops(name)
        assert fp32 and bf16 and 0 < fp32 < bf16


def test_no_name_is_of_two_devices() -> None:
    for name in KNOWN:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, *_ in _PEAKS) == 1
    assert all(source.startswith("https://") for *_, source in _PEAKS)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "AMD Instinct MI300X VF",
        "Tesla T4",
        "",
    ],
)
def test_other_devices_are_not_taken_for_those_of_a_similar_name(name: str) -> None:
    assert peak_flops(name) is None


def test_a_run_is_measured_by_the_peak_of_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert peak_flops_of(gpu, "bf16") == 989.5e12
    assert peak_flops_of(gpu, "fp32") == 67e12
    assert peak_flops_of(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(device_peaks, "multiplied_in", lambda precision: "tf32")
    assert peak_flops_of(gpu, "fp32") == 989.5e12 / 2


def test_float32_is_multiplied_in_float32_unless_pytorch_is_told_otherwise() -> None:
    """In a process of its own: the variable is read once."""
    code = (
        "from llava_train.train.device_peaks import multiplied_in; print(multiplied_in('fp32'), multiplied_in('bf16'))"
    )
    for value, told in (("", "fp32 bf16"), ("1", "tf32 bf16")):
        environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == told
