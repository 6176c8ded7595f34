from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_train.devices import imitates_bf16
from tests.train.helpers import run_ranks, write_samples, write_stage

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {flag for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for flag in line.split()}


@pytest.mark.skipif(not FLAGS or "avx_ne_convert" in FLAGS, reason="tells x86 CPUs by AVX-512 alone")
def test_a_cpu_imitates_bf16_exactly_when_it_lacks_avx512() -> None:
    assert imitates_bf16(torch.device("cpu")) == ("avx512bw" not in FLAGS)


def test_a_gpu_does_not_imitate_bf16() -> None:
    assert not imitates_bf16(torch.device("cuda"))


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_finished_stage_leaves_neither_its_model_nor_deepspeeds_linear_layer(zero: int, tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "iiti")
    engine = {"zero": zero, "precision": "fp32"}
    schedule = {"epochs": 2}  # of one step each: under ZeRO 3 DeepSpeed keeps modules from the second step on
    stages = [write_stage(tmp_path / f"{name}.yaml", engine=engine, schedule=schedule) for name in ("one", "two")]
    run_ranks(["-m", "tests.train.leftovers_rank", *stages], tmp_path).check()
    left = json.loads((tmp_path / "left.json").read_text())
    assert left == [{"engines": 0, "linear_is_torchs": True}] * 2
