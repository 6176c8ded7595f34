from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_train import onednn
from llava_train.onednn import compiles_each_shape, kernels_bytes, next_size, previous_size

_COMPILED = """
import torch
from llava_train.onednn import limit_kernels
limit_kernels()
weight = torch.randn(32, 64).bfloat16()
for round in range(2):
    for rows in range(32, 32 * 13, 32):
        torch.randn(rows, 64).bfloat16() @ weight.T
"""


@given(st.integers(1, 200_000))
def test_a_size_is_the_least_of_few_that_holds_a_number(n: int) -> None:
    size = next_size(n)
    assert n <= size < n + max(32, n / 16)
    assert next_size(size) == size
    assert n == 1 or next_size(n - 1) <= size
    assert previous_size(size) == size
    assert n < 32 or previous_size(n) <= n < next_size(previous_size(n) + 1)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_no_size_is_above_the_most(n: int, room: int) -> None:
    assert n <= next_size(n, n + room) <= n + room


def test_sizes_are_few() -> None:
    assert len({next_size(n) for n in range(1, 1025)}) == 32
    assert len({next_size(n) for n in range(2049, 4097)}) == 16
    assert [next_size(70), next_size(1500), next_size(4000), next_size(4000, most=4050)] == [96, 1536, 4096, 4050]


def test_only_bf16_on_a_cpu_compiles_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert compiles_each_shape(torch.device("cpu"), torch.bfloat16)
    assert not compiles_each_shape(torch.device("cpu"), torch.float32)
    assert not compiles_each_shape(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not compiles_each_shape(torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a CPU on which oneDNN computes no bf16 compiles nothing"
)
@pytest.mark.parametrize(("most", "n_compiled"), [("100", 12), ("4", 24)])
def test_no_more_kernels_are_kept_than_the_limit_says(most: str, n_compiled: int) -> None:
    """Twelve shapes, twice: where all are kept the second round compiles none, where four are it compiles all again."""
    code = _COMPILED.replace(
        "limit_kernels()\nw", f"from llava_train import onednn\nonednn.MOST_KERNELS = {most}\nlimit_kernels()\nw"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ONEDNN_", "DNNL_"))}
    environment |= {"ONEDNN_VERBOSE": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    matmuls = [
        line for line in done.stdout.splitlines() if ",create" in line and "cache_miss" in line and "matmul" in line
    ]
    assert len(matmuls) == n_compiled


def test_the_users_own_limit_stays_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    onednn.limit_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    few = kernels_bytes()
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "many")
    assert kernels_bytes() == few * onednn.MOST_KERNELS / 64
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    onednn.limit_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(onednn.MOST_KERNELS)
