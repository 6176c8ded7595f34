from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_train.model.foreign_files import ForeignError
from llava_train.model.mm_projector import projector_from, save_mm_projector
from llava_train.model.weights import HandOffError, is_whole_model, load_init
from tests.model import originals
from tests.tiny import model_section, tiny_llava


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_it_goes_out_and_comes_back_bit_for_bit_under_the_original_names(kind: str, tmp_path: Path) -> None:
    section = model_section(projector=kind)
    llava = tiny_llava(section)
    layers = llava.model.model.multi_modal_projector
    for parameter in [*layers.linear_1.parameters(), *(layers.linear_2.parameters() if kind != "linear" else ())]:
        torch.nn.init.normal_(parameter)
    with (tmp_path / "mm_projector.bin").open("wb") as file:
        save_mm_projector(llava.model, file)
    names = list(torch.load(tmp_path / "mm_projector.bin", weights_only=True))
    middle = [""] if kind == "linear" else ["0.", "2."]
    assert names == [f"model.mm_projector.{layer}{what}" for layer in middle for what in ("weight", "bias")]
    for place in (tmp_path, tmp_path / "mm_projector.bin"):
        again = tiny_llava(section)
        assert load_init(str(place), again.model, section) == f"projector from {place}"
        state, other = layers.state_dict(), again.model.model.multi_modal_projector.state_dict()
        assert all(torch.equal(state[name], other[name]) for name in state)
    assert not is_whole_model(str(tmp_path))


@given(
    prefix=st.sampled_from(
        ["model.", "", "base_model.model.model.", "module.", "module.model.", "module.base_model.model.model."]
    ),
    is_linear=st.booleans(),
    width=st.integers(1, 5),
)
def test_any_prefix_is_understood(prefix: str, is_linear: bool, width: int) -> None:
    state = originals.projector(linear=is_linear, width=width, prefix=f"{prefix}mm_projector.")
    named, found_linear = projector_from(state, Path("x"))
    assert found_linear == is_linear
    assert set(named) == {f"linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")}
    expected = list(state.values())
    assert torch.equal(named["linear_1.weight"], expected[0])
    assert torch.equal(named["linear_1.bias"], expected[1])
    second = (torch.eye(width), torch.zeros(width)) if is_linear else expected[2:]
    assert torch.equal(named["linear_2.weight"], second[0])
    assert torch.equal(named["linear_2.bias"], second[1])


@pytest.mark.parametrize(
    "names",
    [["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"], ["attn_pool.weight"], ["0.weight"], []],
    ids=["mlp3x", "resampler", "no bias", "nothing"],
)
def test_other_kinds_are_refused_by_name(names: list[str]) -> None:
    state = {f"model.mm_projector.{name}": torch.zeros(2) for name in names}
    with pytest.raises(ForeignError, match="understood are mlp2x_gelu .* and linear"):
        projector_from(state, Path("x"))


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (
            originals.projector(width=16),
            None,
            r"does not fit: linear_1.weight is \[16, 16\] there and \[32, 32\] here; .* name those in the model section",
        ),
        (
            originals.projector(linear=True),
            None,
            "trained with projector = 'linear', this stage has 'mlp2x_gelu'; set model.projector",
        ),
        (
            originals.projector(),
            {"mm_vision_select_layer": -1},
            "vision_feature_layer = -1, this stage has -2; set model.vision_feature_layer",
        ),
        (
            originals.projector(),
            {"mm_vision_select_feature": "cls_patch"},
            "vision_feature_select = 'full', this stage has 'patch'",
        ),
        (
            {**originals.projector(), "model.embed_tokens.weight": torch.zeros(2, 2)},
            None,
            "holds model.embed_tokens.weight too",
        ),
    ],
    ids=["width", "kind", "layer", "select", "tokens"],
)
def test_one_for_another_model_is_refused_with_the_mend(
    state: originals.State, config: dict | None, message: str, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "mm_projector.bin")
    if config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
    with pytest.raises(HandOffError, match=f"^init_from: .*{message}"):
        load_init(str(tmp_path), tiny_llava().model, model_section())
