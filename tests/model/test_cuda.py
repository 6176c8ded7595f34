"""The model on a CUDA device is the model on a CPU: same weights, same packs, bf16's rounding apart."""

from __future__ import annotations

import pytest
import torch

from tests.scripts import load_script

twins = load_script("benchmarks/twins.py")
on_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


@pytest.mark.parametrize("device", DEVICES)
def test_logits_losses_and_gradients_in_bf16_are_those_in_float32_within_rounding(device: str) -> None:
    found = twins.compare(torch.device(device), twins.KERNELS if device == "cuda" else ["eager"])
    assert found["ok"], found
    assert max(found["cpu bf16"].values()) < 0.05, "bounds that allow anything would promise nothing"


def test_a_model_that_computes_something_else_is_out_of_bounds() -> None:
    def lose_a_layer(model) -> None:  # type: ignore[no-untyped-def]
        model.model.language_model.layers = model.model.language_model.layers[:-1]

    cpu = torch.device("cpu")
    model = twins.twin_model()
    pack = twins.twin_pack(model)
    reference = twins.outcome(model, pack, cpu, torch.float32)
    other = twins.outcome(model, pack, cpu, torch.float32, lose_a_layer)
    assert twins.error(other.logits, reference.logits) > 0.05
