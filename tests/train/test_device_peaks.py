from __future__ import annotations

import re

import pytest
import torch

from llava_train.train.device_peaks import _PEAKS, peak_flops, peak_flops_of

KNOWN = {
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


@pytest.mark.parametrize(("name", "tflops"), KNOWN.items())
def test_a_device_is_known_by_its_whole_name(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


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


def test_only_bf16_on_a_gpu_has_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops_of(torch.device("cuda", 0), "bf16") == 989.5e12
    assert peak_flops_of(torch.device("cuda", 0), "fp32") is None
    assert peak_flops_of(torch.device("cpu"), "bf16") is None
