"""A training step doesn't wait for the device, but to know the norm of its gradient.

Without a GPU the operators that would wait are counted, see `benchmarks/waits.py`; on one PyTorch counts itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.devices import DTYPES
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.train.engine import start_engine
from llava_train.train.loop import train_step
from llava_train.train.world import World, start_distributed
from tests.scripts import load_script
from tests.tiny import dataset_of, stage, tiny_llava, write_data

waits = load_script("benchmarks/waits.py")
LORA = {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4, "dropout": 0.05}}
TRAINABLE: dict[str, dict[str, Any]] = {
    "stage 1": {"projector": {"lr": 1e-3}},
    "lora": {"projector": {"lr": 1e-3}, "language_model": LORA},
    "all": {part: {"lr": 1e-3} for part in ("projector", "language_model", "vision_tower")},
}
CASES = [(0, "fp32", "lora"), (0, "fp32", "all"), (2, "bf16", "stage 1"), (2, "bf16", "lora")]
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def world() -> World:
    return start_distributed()


@pytest.mark.parametrize(
    ("zero", "precision", "trains"), CASES + [pytest.param(*case, marks=ON_CUDA) for case in CASES[2:]]
)
def test_a_step_waits_for_its_norm_alone(zero: int, precision: str, trains: str, world: World, tmp_path: Path) -> None:
    data = write_data(tmp_path, 12)
    engine_keys = {"zero": zero, "precision": precision, "activation_checkpointing": "none"}
    config = stage(data, trainable=TRAINABLE[trains], engine=engine_keys)
    llava = tiny_llava(dtype=DTYPES[precision])
    set_trainable(llava.model, config.trainable)
    engine = start_engine(PackedLoss(llava.model.train()), parameter_groups(llava.model, config.trainable, 0.0), config)
    few, many = (dataset_of(llava, data, max_tokens=max_tokens)[0] for max_tokens in (2048, 500))
    if world.device.type == "cuda":
        few, many = few.pin_memory(), many.pin_memory()
    assert len(many.micro_batches) > len(few.micro_batches)
    assert any(pack.n_images == 0 for pack in many.micro_batches), "a pack without a picture takes another way"
    train_step(engine, world, few, few.n_supervised)

    def places(batch: Any) -> Counter[str]:
        return waits.waits_of(lambda: train_step(engine, world, batch, batch.n_supervised), world.device)

    of_few, of_many = places(few), places(many)
    assert of_few, "the norm is waited for: nothing found means that nothing is counted"
    of_norm = ("llava_train/train/engine.py", "deepspeed/runtime/")
    assert all(place.startswith(of_norm) for place in of_many), of_many
    assert of_many == of_few, "a micro-step more is not a wait more"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there PyTorch counts")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.zeros_like(x).masked_scatter(x > 0, x).sum().backward(),
    ],
)
def test_operators_that_need_a_value_are_counted(call: Any) -> None:
    x = torch.randn(4, requires_grad=True)
    assert sum(waits.waits_of(lambda: call(x), torch.device("cpu")).values()) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tells_where_it_waits() -> None:
    x = torch.ones(2, device="cuda")
    (place,) = waits.waits_of(lambda: x.sum().item(), x.device)
    assert place.startswith("tests/train/test_step_waits.py:")
