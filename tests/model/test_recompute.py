from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.config import TrainableSection
from llava_train.model.loss import PackedLoss
from llava_train.model.recompute import RECOMPUTES, Recompute, enable_recompute
from llava_train.model.trainable import set_trainable
from tests.tiny import dataset_of, tiny_llava, write_data

TRAINABLE: dict[str, dict[str, Any]] = {
    "full": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}},
    "lora with dropout": {
        "projector": {"lr": 1e-3},
        "language_model": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.3}},
    },
    "projector": {"projector": {"lr": 1e-3}},
    "vision tower": {"vision_tower": {"lr": 1e-3}, "projector": {"lr": 1e-3}},
}


def trained_once(recompute: Recompute, trainable: str, dtype: torch.dtype, data: Path) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a pack."""
    llava = tiny_llava(dtype=dtype)
    set_trainable(llava.model, TrainableSection(**TRAINABLE[trainable]))
    with torch.no_grad():  # adapters start at zero, and then dropout would change nothing
        for name, parameter in llava.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    llava.model.train()
    for part in (llava.model.model.language_model, llava.model.model.vision_tower):
        enable_recompute(part, recompute)
    (pack,) = dataset_of(llava, data)[0].micro_batches
    torch.manual_seed(0)
    loss, _ = PackedLoss(llava.model)(**pack.model_inputs())
    loss.backward()
    gradients = {name: p.grad for name, p in llava.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_no_way_of_checkpointing_changes_a_bit_of_loss_or_gradients(
    trainable: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    expected, *others = (trained_once(recompute, trainable, dtype, data) for recompute in RECOMPUTES)
    assert len(expected) > 2
    for found in others:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_checkpointing_is_enabled_by_no_function_that_transformers_will_remove(recompute: Recompute) -> None:
    language_model = tiny_llava().model.model.language_model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_recompute(language_model, recompute)
