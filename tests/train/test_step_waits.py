"""A training step doesn't wait for the device, but to know the norm of its gradient.

Without a GPU the operators that would wait are counted, see `benchmarks/waits.py`; on one PyTorch counts itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from llava_train.config import StageConfig
from llava_train.devices import DTYPES
from llava_train.model.build import Llava
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.train.engine import start_engine, stop_engine
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


def started(config: StageConfig) -> tuple[Llava, deepspeed.DeepSpeedEngine]:
    llava = tiny_llava(dtype=DTYPES[config.engine.precision])
    set_trainable(llava.model, config.trainable)
    groups = parameter_groups(llava.model, config.trainable, 0.0)
    return llava, start_engine(PackedLoss(llava.model.train()), groups, config)


@pytest.mark.parametrize(
    ("zero", "precision", "trains"), CASES + [pytest.param(*case, marks=ON_CUDA) for case in CASES[2:]]
)
def test_a_step_waits_for_its_norm_alone(zero: int, precision: str, trains: str, world: World, tmp_path: Path) -> None:
    data = write_data(tmp_path, 12)
    engine_keys = {"zero": zero, "precision": precision, "activation_checkpointing": "none"}
    config = stage(data, trainable=TRAINABLE[trains], engine=engine_keys)
    llava, engine = started(config)
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


@pytest.mark.parametrize(
    ("zero", "user", "n_expected"),
    [
        (0, {}, 0),
        (1, {}, 0),
        (2, {}, 0),
        (3, {}, 0),
        (2, {"timers": {"throughput": {"enabled": True}}}, 7),  # what a user asks for is measured
    ],
)
def test_no_step_synchronises_the_device(
    zero: int, user: dict[str, Any], n_expected: int, world: World, tmp_path: Path
) -> None:
    """DeepSpeed's throughput timer does from the third step on, in every micro-step."""
    data = write_data(tmp_path, 12)
    engine_keys = {"zero": zero, "precision": "bf16", "activation_checkpointing": "none", "deepspeed": user}
    llava, engine = started(stage(data, engine=engine_keys))
    batch, n_synchronised = dataset_of(llava, data, max_tokens=500)[0], []
    assert len(batch.micro_batches) == 6
    for _ in range(4):
        with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
            train_step(engine, world, batch, batch.n_supervised)
        n_synchronised.append(synchronize.call_count)
    stop_engine(engine)
    assert n_synchronised == [0, 0, n_expected, n_expected]


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
