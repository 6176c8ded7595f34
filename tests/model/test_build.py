from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.model.build import BuildError, build_llava, byte_tokenizer
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, model_section

SHAPE = {key: VISION_TOWER[key] for key in VISION_TOWER if key != "model_type"}
TOWERS = {
    "clip_vision_model": (SHAPE, 4),
    "siglip_vision_model": (SHAPE, 4),
    "dinov2": (SHAPE, 4),
    "dinov2_with_registers": ({**SHAPE, "num_register_tokens": 3}, 7),
}
"""Settings, and image tokens with `patch`: SigLIP, which has no class token, is asked for `full`."""

LANGUAGE_MODELS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
}


def build(section: ModelSection, **image):
    return build_llava(section, ImageSection(**image), torch.float32)


def section_of(tower: str = "clip_vision_model", **changes) -> ModelSection:
    config = {"model_type": tower, **TOWERS[tower][0]}
    select = "full" if tower == "siglip_vision_model" else "patch"
    settings = {"vision_tower": RandomVisionTower(config=config), "vision_feature_select": select, **changes}
    return model_section(**settings)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_processor_makes_as_many_image_tokens_as_the_tower_gives_features(tower: str) -> None:
    llava = build(section_of(tower))
    assert llava.n_image_tokens == TOWERS[tower][1]
    picture = Image.new("RGB", (50, 30), "red")
    inputs = llava.processor(images=picture, text="<image>", return_tensors="pt")
    features = llava.model.get_image_features(inputs.pixel_values).pooler_output[0]
    assert (inputs.input_ids == llava.model.config.image_token_id).sum() == len(features) == llava.n_image_tokens


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_text_gets_the_logits_that_the_language_model_gives_alone(family: str) -> None:
    config = {**LANGUAGE_MODEL, "model_type": family, **LANGUAGE_MODELS[family]}
    llava = build(model_section(language_model=RandomLanguageModel(config=config, seed=3)))
    tokenizer = byte_tokenizer()
    settings = {k: v for k, v in config.items() if k != "model_type"}
    torch.manual_seed(3)
    alone = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **settings, vocab_size=len(tokenizer))
    ).eval()
    llava.model.model.language_model.set_attn_implementation("sdpa")
    input_ids = tokenizer("What is it?", return_tensors="pt").input_ids
    ours = llava.model(input_ids=input_ids).logits[..., : len(tokenizer)]
    torch.testing.assert_close(ours, alone(input_ids=input_ids).logits)
    tied = llava.model.lm_head.weight is llava.model.get_input_embeddings().weight
    assert tied == (family == "tied")


def test_new_rows_of_the_embeddings_are_the_mean_of_the_old_ones() -> None:
    llava = build(model_section())
    weight, n_old = llava.model.get_input_embeddings().weight, len(byte_tokenizer())
    assert llava.model.config.image_token_id == n_old
    assert len(weight) % 64 == 0
    torch.testing.assert_close(weight[n_old], weight[:n_old].mean(dim=0))


def test_the_same_section_builds_the_same_model_whatever_the_global_random_state() -> None:
    first = build(model_section()).model.state_dict()
    torch.manual_seed(99)
    second = build(model_section()).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_linear_projector_is_one_layer_and_an_exact_identity() -> None:
    llava = build(model_section(projector="linear"))
    projector = llava.model.model.multi_modal_projector
    features = torch.randn(7, 32)
    assert torch.equal(projector(features), projector.linear_1(features))


def test_the_features_of_several_layers_are_joined() -> None:
    llava = build(model_section(vision_feature_layer=[-3, -2]))
    assert llava.model.model.multi_modal_projector.linear_1.in_features == 64
    assert llava.n_image_tokens == 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved parts: a language model with its tokenizer, and two-tower models of which LLaVA wants one half."""
    root = tmp_path_factory.mktemp("parts")
    byte_tokenizer().save_pretrained(root / "lm")
    settings = {k: v for k, v in LANGUAGE_MODEL.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings, vocab_size=264)).save_pretrained(
        root / "lm"
    )
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SHAPE)).save_pretrained(root / "clip")
    SiglipModel(SiglipConfig(text_config=text, vision_config=SHAPE)).save_pretrained(root / "siglip")
    Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(root / "dinov2")
    for name in ("clip", "siglip", "dinov2"):
        CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5]).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_parts_load_from_folders_with_their_own_weights_and_colours(tower: str, folders: Path) -> None:
    select = "full" if tower == "siglip" else "patch"
    section = ModelSection(
        language_model=str(folders / "lm"),
        vision_tower=str(folders / tower),
        vision_feature_select=select,
        chat_template="chatml",
    )
    llava = build(section)
    assert llava.n_image_tokens == 4
    assert list(llava.processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    saved = {"clip": CLIPModel, "siglip": SiglipModel, "dinov2": Dinov2Model}[tower].from_pretrained(folders / tower)
    expected = dict(getattr(saved, "vision_model", saved).named_parameters())
    loaded = dict(llava.model.model.vision_tower.named_parameters())
    shared = [name for name in loaded if name in expected]
    assert len(shared) == len(loaded)
    assert all(torch.equal(loaded[name], expected[name]) for name in shared)


def test_dinov2_takes_pictures_of_another_size() -> None:
    llava = build(section_of("dinov2"), size=56)
    assert llava.n_image_tokens == 16
    assert llava.processor.image_processor.crop_size["height"] == 56


@pytest.mark.parametrize(
    ("aspect", "column", "is_padding"), [("pad", 0, True), ("crop", 0, False), ("resize", 0, False)]
)
def test_a_tall_picture_is_padded_cropped_or_squeezed(aspect: str, column: int, is_padding: bool) -> None:
    llava = build(model_section(), aspect=aspect)
    picture = Image.new("RGB", (20, 60), "white")
    pixels = llava.processor.image_processor(picture, return_tensors="pt").pixel_values[0]
    assert pixels.shape == (3, 28, 28)
    assert (pixels[:, 14, column].abs().max() < 0.05) == is_padding  # the encoder's mean colour becomes zero
    assert pixels[:, 14, 14].min() > 1


@pytest.mark.parametrize(
    ("changes", "image", "message"),
    [
        ({"vision_tower": RandomVisionTower(config={"model_type": "vit"})}, {}, "is a vit; supported: clip_vision_model"),
        ({"vision_tower": RandomVisionTower(config={"model_type": "siglip2_vision_model"})}, {}, "is a siglip2_vision_model; supported: clip"),
        ({"vision_feature_layer": -9}, {}, "model.vision_feature_layer: -9 is out of range; the tower has hidden states -4 to 3"),
        ({}, {"size": 56}, "image.size: 56, but clip_vision_model takes 28 pixels only"),
        ({"vision_tower": RandomVisionTower(config={"hidden_size": 8})}, {}, "model.vision_tower.config: model_type is missing"),
        ({"language_model": RandomLanguageModel(config={"model_type": "nope"})}, {}, "model.language_model.config: "),
        ({"language_model": "no/such/folder"}, {}, "model.language_model: cannot load no/such/folder"),
        ({"vision_tower": "no/such/folder"}, {}, "model.vision_tower: cannot load no/such/folder"),
        ({"language_model": RandomLanguageModel(config={"model_type": "cohere", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "logit_scale": 0.06})}, {}, "cohere changes its logits (logit_scale)"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_joined_are_refused(changes: dict, image: dict, message: str) -> None:
    with pytest.raises(BuildError) as caught:
        build(model_section(**changes), **image)
    assert message in str(caught.value)


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(BuildError, match="image.size: 50 is not a multiple of the encoder's patch size 14"):
        build(section_of("dinov2"), size=50)
