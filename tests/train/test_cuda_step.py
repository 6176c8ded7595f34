"""Steps on a CUDA device, through DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.scripts import load_script

rig_module = load_script("benchmarks/rig.py")
shapes = load_script("benchmarks/shapes.py")
kernels = load_script("benchmarks/gpu_kernels.py")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def compiled() -> Iterator:
    from llava_train.train.world import start_distributed

    config = shapes.stage_config("twin", "lora", 8, 1024, zero=2, precision="bf16", kernels="compile")
    rig = rig_module.start_rig(config, start_distributed())
    yield rig
    rig_module.stop_rig(rig)


def test_packs_of_other_lengths_compile_nothing_anew(compiled) -> None:
    first, *others = rig_module.draw_steps(compiled, 8)
    compiled.step(first)
    n_graphs = kernels.unique_graphs()
    lengths = {pack.input_ids.numel() for batch in others for pack in batch.micro_batches}
    assert n_graphs and len(lengths) > 8
    for batch in others:
        compiled.step(batch)
    assert kernels.unique_graphs() <= n_graphs + 1, "one may be for a pack without a picture"


def test_a_step_moves_what_trains_and_memory_comes_back() -> None:
    from llava_train.train.world import start_distributed

    before = torch.cuda.memory_allocated()
    config = shapes.stage_config("twin", "full", 8, 1024, zero=2, precision="bf16")
    rig = rig_module.start_rig(config, start_distributed())
    found = rig_module.measure(rig, rig_module.draw_steps(rig, 4), n_warmup=1)
    assert found["tflops"] > 0 and found["peak_gib"] > 0 and 4 < found["loss"] < 8
    rig_module.stop_rig(rig)
    assert torch.cuda.memory_allocated() < before + 2**26
