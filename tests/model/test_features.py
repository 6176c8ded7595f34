from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from llava_train.config import ImageSection, RandomVisionTower
from llava_train.model.build import build_llava
from llava_train.model.features import encode, encoder_hash, feature_shape, project, vision_tower_of
from llava_train.model.recompute import layers_of
from tests.tiny import VISION_TOWER, model_section, tiny_llava

TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
LAYERS: list[dict[str, Any]] = [
    {},
    {"vision_feature_select": "full"},
    {"vision_feature_layer": [-3, -1]},
    {"vision_feature_layer": 1},
    {"vision_feature_layer": [1, 2], "vision_feature_select": "full"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", LAYERS)
@torch.no_grad()
def test_encoding_and_projecting_is_what_transformers_does(changes: dict[str, Any], dtype: torch.dtype) -> None:
    llava = tiny_llava(model_section(**changes), dtype)
    pixels = torch.randn(3, 3, 28, 28)
    features = encode(llava.model, pixels)
    assert features.shape == (3, *feature_shape(llava))
    assert (features.dtype, features.is_contiguous()) == (dtype, True)
    expected = torch.cat(llava.model.get_image_features(pixels.to(dtype)).pooler_output)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(project(llava.model, features), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [*LAYERS, {"vision_feature_layer": [-1, 0, -1, 3]}, {"vision_feature_layer": 0}])
@pytest.mark.parametrize("model_type", TOWERS)
def test_only_the_chosen_layers_are_kept_and_the_features_are_those_of_all_layers_bit_for_bit(
    model_type: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    tower = {**VISION_TOWER, "model_type": model_type, "num_hidden_layers": 6}
    full = {"vision_feature_select": "full"} if model_type == "siglip_vision_model" else {}  # it has no class token
    model = tiny_llava(model_section(**{**changes, **full}, vision_tower=RandomVisionTower(config=tower)), dtype).model
    pixels = torch.randn(3, 3, 28, 28)
    chosen = model.config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    start = int(model.config.vision_feature_select_strategy == "default")
    states = vision_tower_of(model)(pixels.to(dtype), output_hidden_states=True).hidden_states
    expected = torch.cat([states[layer][:, start:] for layer in chosen], dim=-1)
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def remember(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(weakref.ref(output))
        if len(outputs) == 6:
            alive.extend(number for number, each in enumerate(outputs, start=1) if each() is not None)

    for layer in layers_of(vision_tower_of(model)):
        layer.register_forward_hook(remember)
    with torch.no_grad():
        assert torch.equal(encode(model, pixels), expected)
    assert len(outputs) == 6
    # Alive are the chosen ones, the input of the last layer and its output.
    assert set(alive) == ({layer % 7 for layer in chosen} | {5, 6}) - {0}
    assert torch.equal(encode(model, pixels), expected), "with a gradient too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_on_a_cpu_features_do_not_depend_on_the_pictures_beside(dtype: torch.dtype) -> None:
    llava = tiny_llava(dtype=dtype)
    pixels = torch.randn(9, 3, 28, 28)
    alone = torch.cat([encode(llava.model, pixels[i : i + 1]) for i in range(9)])
    for n_together in (2, 4, 9):
        together = [encode(llava.model, pixels[start : start + n_together]) for start in range(0, 9, n_together)]
        assert torch.equal(torch.cat(together), alone)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_together", [1, 7, 32])
@torch.no_grad()
def test_on_a_gpu_features_differ_by_rounding_from_those_of_other_neighbours(n_together: int) -> None:
    """cuBLAS may take another kernel for another number of rows: not bit for bit there."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336}
    section = model_section(vision_tower=RandomVisionTower(config={**VISION_TOWER, **tower, "num_hidden_layers": 4}))
    model = tiny_llava(section, torch.bfloat16).model.cuda()
    pixels = torch.randn(32, 3, 336, 336, device="cuda")
    expected = encode(model, pixels[:28])
    found = torch.cat([encode(model, part) for part in pixels.split(n_together)])[:28]
    print(f"{n_together} at once: {(found != expected).float().mean():.2%} of the features differ from those of 28")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_the_hash_knows_all_that_decides_the_features() -> None:
    plain = tiny_llava()
    hashes = [
        encoder_hash(plain, "cpu"),
        encoder_hash(plain, "cuda"),
        encoder_hash(tiny_llava(dtype=torch.bfloat16), "cpu"),
    ]
    hashes += [encoder_hash(tiny_llava(model_section(**changes)), "cpu") for changes in LAYERS[1:]]
    hashes.append(
        encoder_hash(tiny_llava(model_section(vision_tower=RandomVisionTower(config=VISION_TOWER, seed=1))), "cpu")
    )
    for aspect in ("crop", "resize"):
        hashes.append(encoder_hash(build_llava(model_section(), ImageSection(aspect=aspect), torch.float32), "cpu"))
    with torch.no_grad():
        next(iter(plain.model.model.vision_tower.parameters())).view(-1)[0] += 1e-3
    hashes.append(encoder_hash(plain, "cpu"))
    assert len(set(hashes)) == len(hashes) == 11


def test_features_of_pictures_that_were_decoded_otherwise_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of version 1 hold pictures whose transparency was dropped."""
    now = encoder_hash(tiny_llava(), "cpu")
    monkeypatch.setattr("llava_train.model.features._VERSION", 1)
    assert encoder_hash(tiny_llava(), "cpu") != now


def test_the_hash_knows_nothing_else() -> None:
    """Projector, chat template and the folder that the tower came from may change."""
    other = tiny_llava(model_section(projector="linear", chat_template="chatml"))
    other.model.model.vision_tower.config._name_or_path = "elsewhere"
    assert encoder_hash(other, "cpu") == encoder_hash(tiny_llava(), "cpu")
