from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.model.build import build_llava
from llava_train.model.compatibility import BuildError
from llava_train.model.processor import byte_tokenizer
from llava_train.model.weights import export_model
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


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_joins_every_language_model(tower: str, family: str) -> None:
    config = {**LANGUAGE_MODEL, "model_type": family, **LANGUAGE_MODELS[family]}
    llava = build(section_of(tower, language_model=RandomLanguageModel(config=config)))
    llava.model.model.language_model.set_attn_implementation("sdpa")
    pictures = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    blank, red, blue = (
        llava.model(**llava.processor(images=picture, text="<image>What?", return_tensors="pt")).logits[0]
        for picture in (Image.new("RGB", (30, 30)), *pictures)
    )
    assert red.shape == (llava.n_image_tokens + len("What?"), llava.model.lm_head.out_features)
    assert red.isfinite().all()
    assert not torch.equal(red[-1], blue[-1]) and not torch.equal(red[-1], blank[-1])  # the picture is seen


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
    assert torch.equal(projector.linear_2.weight, torch.eye(32))
    assert not projector.linear_2.bias.any()
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.randn(7, 32, dtype=dtype)
        projector = projector.to(dtype)
        assert torch.equal(projector(features), projector.linear_1(features))


def test_the_features_of_several_layers_are_joined() -> None:
    llava = build(model_section(vision_feature_layer=[-3, -2]))
    assert llava.model.model.multi_modal_projector.linear_1.in_features == 64
    assert llava.n_image_tokens == 4


SAVED_TOWERS = {
    "clip": CLIPModel,
    "clip-vision": CLIPVisionModel,
    "siglip": SiglipModel,
    "siglip-vision": SiglipVisionModel,
    "dinov2": Dinov2Model,
    "dinov2-registers": Dinov2WithRegistersModel,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved parts: language models with their tokenizer, and encoders, some of them half of a two-tower model."""
    root = tmp_path_factory.mktemp("parts")
    settings = {k: v for k, v in LANGUAGE_MODEL.items() if k != "model_type"}
    for family, changes in LANGUAGE_MODELS.items():
        config = {"model_type": family, **settings, **changes}
        config = AutoConfig.for_model(config.pop("model_type"), **config, vocab_size=264)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
        byte_tokenizer().save_pretrained(root / family)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=SHAPE)).save_pretrained(root / "clip")
    SiglipModel(SiglipConfig(text_config=text, vision_config=SHAPE)).save_pretrained(root / "siglip")
    CLIPVisionModel(CLIPVisionConfig(**SHAPE)).save_pretrained(root / "clip-vision")
    SiglipVisionModel(SiglipVisionConfig(**SHAPE)).save_pretrained(root / "siglip-vision")
    Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(root / "dinov2")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3)).save_pretrained(
        root / "dinov2-registers"
    )
    for name in SAVED_TOWERS:
        CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5]).save_pretrained(root / name)
    return root


def saved_section(folders: Path, language_model: str = "llama", tower: str = "clip") -> ModelSection:
    return ModelSection(
        language_model=str(folders / language_model),
        vision_tower=str(folders / tower),
        vision_feature_select="full" if tower.startswith("siglip") else "patch",
        chat_template="chatml",
    )


@pytest.mark.parametrize("tower", SAVED_TOWERS)
def test_towers_load_from_folders_with_their_own_weights_and_colours(tower: str, folders: Path) -> None:
    llava = build(saved_section(folders, tower=tower))
    assert llava.n_image_tokens == (7 if tower == "dinov2-registers" else 4)
    assert list(llava.processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    saved = SAVED_TOWERS[tower].from_pretrained(folders / tower)
    picture = torch.randn(1, 3, 28, 28)
    expected = getattr(saved, "vision_model", saved)(picture, output_hidden_states=True).hidden_states
    ours = llava.model.model.vision_tower(picture, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_models_load_from_folders_with_their_own_weights(family: str, folders: Path) -> None:
    llava = build(saved_section(folders, language_model=family))
    alone = AutoModelForCausalLM.from_pretrained(folders / family)
    llava.model.model.language_model.set_attn_implementation("sdpa")
    input_ids = llava.tokenizer("What is it?", return_tensors="pt").input_ids
    logits = llava.model(input_ids=input_ids).logits[..., :264]
    torch.testing.assert_close(logits, alone(input_ids=input_ids).logits[..., :264])
    assert (llava.model.lm_head.weight is llava.model.get_input_embeddings().weight) == (family == "tied")


def test_sampling_settings_that_a_language_model_does_not_use_are_left_out(folders: Path, tmp_path: Path) -> None:
    """Vicuna's generation_config.json holds such ones, and transformers refuses to save them."""
    shutil.copytree(folders / "llama", tmp_path / "llama")
    file = tmp_path / "llama/generation_config.json"
    vicuna = {"_from_model_config": True, "eos_token_id": 2, "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    file.write_text(json.dumps(vicuna))
    section = model_section(language_model=str(tmp_path / "llama"))
    llava = build(section)
    export_model(llava.model, llava.processor, 2, tmp_path / "model")
    saved = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert saved["max_length"] == 4096 and not {"temperature", "top_p"} & saved.keys()
    file.write_text(json.dumps({**vicuna, "do_sample": True}))
    assert build(section).model.generation_config.temperature == 0.9


def test_a_language_model_that_has_a_sentencepiece_tokenizer_alone_is_taken(folders: Path, tmp_path: Path) -> None:
    """As Vicuna: tokenizer.model, and no tokenizer.json."""
    shutil.copytree(folders / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "corpus.txt").write_text("what is this\nthis is it\n" * 100)
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "llama/tokenizer"),
        vocab_size=280,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "llama/tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = build(model_section(language_model=str(tmp_path / "llama"))).tokenizer
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("what is it").input_ids) == "<s> what is it"


def test_a_folder_without_an_image_processor_is_refused(folders: Path, tmp_path: Path) -> None:
    Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(tmp_path / "bare")
    section = model_section(vision_tower=str(tmp_path / "bare"))
    with pytest.raises(BuildError, match="model.vision_tower: cannot load .*bare: .*preprocessor_config.json"):
        build(section)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    part = RandomLanguageModel(config=LANGUAGE_MODEL, tokenizer=str(tmp_path))
    with pytest.raises(BuildError, match="model.language_model: .* has no fast tokenizer"):
        build(model_section(language_model=part))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1}, "computes no s_aux"),
        ({"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": None}, "computes no softcap"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "its documents see each other"),
        ({"model_type": "minimax"}, "its documents see each other"),
        ({"model_type": "falcon_h1"}, "it keeps a state that runs from one document into the next"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "set attention_dropout to 0 in its config.json"),
        ({"model_type": "stablelm"}, "TypeError: "),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_language_models_that_packs_would_change_are_refused(changes: dict, message: str) -> None:
    part = RandomLanguageModel(config={**LANGUAGE_MODEL, **changes})
    with pytest.raises(BuildError, match=f"a {changes['model_type']} cannot be trained in packs: .*{message}"):
        build(model_section(language_model=part))


def test_a_language_model_without_the_embeddings_of_llava_is_refused() -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}
    with pytest.raises(BuildError, match="gpt2 has no embed_tokens"):
        build(model_section(language_model=RandomLanguageModel(config=config)))


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
        ({"vision_tower": RandomVisionTower(config={**VISION_TOWER, "model_type": "siglip_vision_model"})}, {}, "model.vision_feature_select: patch drops the class token, which a siglip_vision_model does not have; use full"),
        ({"vision_feature_layer": 4}, {}, "model.vision_feature_layer: 4 is out of range"),
        ({"vision_feature_layer": [-2, 9]}, {}, "model.vision_feature_layer: 9 is out of range"),
        ({"vision_tower": RandomVisionTower(config={**VISION_TOWER, "hidden_size": 33})}, {}, "model.vision_tower.config: "),
        ({"language_model": RandomLanguageModel(config={**LANGUAGE_MODEL, "hidden_size": 33})}, {}, "model.language_model.config: "),
        ({"language_model": RandomLanguageModel(config={"hidden_size": 8})}, {}, "model.language_model.config: model_type is missing"),
        ({"language_model": RandomLanguageModel(config=VISION_TOWER)}, {}, "model.language_model: cannot load a clip_vision_model with tokenizer bytes: "),
        ({"language_model": RandomLanguageModel(config=LANGUAGE_MODEL, tokenizer="no/such/folder")}, {}, "model.language_model: cannot load no/such/folder"),
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
