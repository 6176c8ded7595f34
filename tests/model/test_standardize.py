from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_train.model.build import Llava
from llava_train.model.standardize import feature_statistics, fold, standardize
from tests.tiny import model_section, tiny_llava

CPU = torch.device("cpu")
PICTURES = [torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def projected(llava: Llava) -> torch.Tensor:
    """What the language model gets for the first pictures: float32 [3, image tokens, hidden]."""
    with torch.no_grad():
        pixels = PICTURES[0].to(llava.model.dtype)
        return torch.stack(list(llava.model.get_image_features(pixels).pooler_output)).float()


def projector_state(llava: Llava) -> dict[str, torch.Tensor]:
    """The projector's parameters under the names that a run gathers."""
    return {name: p.detach() for name, p in llava.model.named_parameters() if "projector" in name}


def standardized(is_new: bool, dtype: torch.dtype = torch.float32, **section: Any) -> Llava:
    llava = tiny_llava(model_section(**section), dtype)
    standardize(llava.model, *feature_statistics(llava.model, PICTURES, CPU), is_new=is_new)
    return llava


@pytest.mark.parametrize("section", [{}, {"vision_feature_layer": [-2, -1]}, {"projector": "linear"}])
def test_inputs_of_the_weights_have_mean_0_and_deviation_1(section: dict[str, Any]) -> None:
    llava = standardized(is_new=True, **section)
    layer = llava.model.model.multi_modal_projector.linear_1
    with torch.no_grad():
        layer.weight.copy_(torch.eye(*layer.weight.shape))
        layer.bias.zero_()
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda *call: seen.append(call[2].flatten(0, -2)))
    for pixels in PICTURES:
        llava.model.get_image_features(pixels)
    inputs = torch.cat(seen)
    torch.testing.assert_close(inputs.mean(dim=0), torch.zeros(inputs.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std(dim=0), torch.ones(inputs.shape[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("section", [{}, {"projector": "linear"}])
def test_a_new_projector_keeps_its_weights(section: dict[str, Any]) -> None:
    before, after = (
        projector_state(tiny_llava(model_section(**section))),
        projector_state(standardized(True, **section)),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trained_projector_keeps_its_function() -> None:
    plain, llava = tiny_llava(), standardized(is_new=False)
    assert not torch.allclose(
        projector_state(plain)["model.multi_modal_projector.linear_1.weight"],
        projector_state(llava)["model.multi_modal_projector.linear_1.weight"],
    )
    torch.testing.assert_close(projected(llava), projected(plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_folded_projector_is_plain_and_computes_the_same(dtype: torch.dtype, tolerance: float) -> None:
    llava, plain = standardized(True, dtype), tiny_llava(dtype=dtype)
    wanted = projected(llava)
    assert not torch.allclose(projected(plain), wanted, atol=5 * tolerance)
    unexpected = plain.model.load_state_dict(fold(llava.model, projector_state(llava)), strict=False).unexpected_keys
    assert not unexpected
    torch.testing.assert_close(projected(plain), wanted, atol=tolerance, rtol=tolerance)


def test_folding_leaves_a_plain_projector_alone() -> None:
    llava = tiny_llava()
    state = projector_state(llava)
    assert fold(llava.model, state) is state


def test_a_feature_that_never_changes_is_not_blown_up() -> None:
    llava = tiny_llava()
    same = [torch.zeros(2, 3, 28, 28)]
    mean, deviation = feature_statistics(llava.model, same, CPU)
    patches = mean.isfinite() & deviation.isfinite() & (deviation > 0)
    assert patches.all()


def test_checkpoints_hold_the_statistics() -> None:
    names = standardized(is_new=True).model.state_dict().keys()
    assert {"model.multi_modal_projector.linear_1.mean", "model.multi_modal_projector.linear_1.deviation"} <= names
