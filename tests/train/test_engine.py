from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_train.devices import imitates_bf16

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {flag for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for flag in line.split()}


@pytest.mark.skipif(not FLAGS or "avx_ne_convert" in FLAGS, reason="tells x86 CPUs by AVX-512 alone")
def test_a_cpu_imitates_bf16_exactly_when_it_lacks_avx512() -> None:
    assert imitates_bf16(torch.device("cpu")) == ("avx512bw" not in FLAGS)


def test_a_gpu_does_not_imitate_bf16() -> None:
    assert not imitates_bf16(torch.device("cuda"))
