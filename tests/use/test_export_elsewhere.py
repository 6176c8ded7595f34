"""Exported models in processes that have no llava_train, under transformers 5 and 4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.data.images import ImagePreprocessor, decode_image
from llava_train.data.samples import Turn
from llava_train.model.build import Llava
from llava_train.model.export_files import write_model
from llava_train.use.export import export
from tests.data.chat_tokenizers import llama_like
from tests.tiny import encoder_of
from tests.use.exports import LLAMA3_ROPE, LORA, QUESTION, llava_of, use_plainly, write_picture, write_run

VERSIONS = ["5", pytest.param("4", marks=pytest.mark.transformers4)]


@dataclass
class Models:
    """Models in memory, their exports, and what processes of each version made of these."""

    in_memory: dict[str, Llava]
    folders: dict[str, Path]
    found: dict[str, dict[str, Any]]


def make(folder: Path) -> dict[str, Llava]:
    bos = folder / "llama-tokenizer"
    llama_like().save_pretrained(bos)
    tied = {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}
    return {
        "clip": llava_of(),
        "clip-bos": llava_of(tokenizer=str(bos), tie_word_embeddings=True),
        "siglip-tied-chatml": llava_of("siglip_vision_model", "chatml", **tied),
        "dinov2-tied-chatml": llava_of("dinov2", "chatml", **tied),
        "dinov2-registers-mistral": llava_of("dinov2_with_registers", "mistral", model_type="mistral"),
        "clip-qwen2": llava_of(template="chatml", model_type="qwen2"),
    }


NAMES = ["clip", "clip-bos", "siglip-tied-chatml", "dinov2-tied-chatml", "dinov2-registers-mistral", "clip-qwen2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("exports")
    in_memory = make(folder)
    for name, llava in in_memory.items():
        write_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), folder / name)
    return Models(in_memory, {name: folder / name for name in in_memory}, {})


@pytest.fixture
def found(models: Models, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process makes of the models, made at the first call for a version."""

    def look(version: str) -> dict[str, Any]:
        if version not in models.found:
            first = request.getfixturevalue("transformers4") if version == "4" else None
            models.found[version] = use_plainly(tmp_path_factory.mktemp(version), models.folders, first)
        assert models.found[version]["version"].split(".")[0] == version
        return dict(models.found[version]["models"])

    return look


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_others_load_every_weight_and_compute_our_logits(models: Models, found: Any, name: str, version: str) -> None:
    theirs, llava = found(version)[name], models.in_memory[name]
    assert theirs["loading"] == {}
    assert theirs["tied"] == llava.model.config.tie_word_embeddings
    ids, pixels = (torch.tensor(theirs[key])[None] for key in ("input_ids", "pixel_values"))
    with torch.no_grad():
        ours = llava.model(input_ids=ids, pixel_values=pixels).logits[0]
    torch.testing.assert_close(torch.tensor(theirs["logits"]), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_others_see_the_tokens_and_pixels_of_training(
    models: Models, found: Any, name: str, version: str, tmp_path: Path
) -> None:
    theirs, llava = found(version)[name], models.in_memory[name]
    encoder = encoder_of(llava)
    text, _ = encoder.render((Turn("user", f"<image>\n{QUESTION}"),), prompt=True)
    assert theirs["prompts"] == [text, text], "parts and text give the prompt of training"
    assert theirs["prompt_of_tokenizer"] == text, "lmms-eval asks the tokenizer"
    assert theirs["input_ids"] == encoder.tokenize(text, [], 1)[0].tolist()
    assert theirs["same_without_special_tokens"], "no begin-of-sequence token comes twice"
    picture = decode_image(write_picture(tmp_path / "picture.png"))
    ours = ImagePreprocessor(llava.processor.image_processor)(picture)
    torch.testing.assert_close(torch.tensor(theirs["pixel_values"]), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_others_stop_at_the_end_of_a_turn(models: Models, found: Any, name: str, version: str) -> None:
    theirs, end = found(version)[name], encoder_of(models.in_memory[name]).end_of_turn_id()
    assert theirs["n_generated"][str(end)] == 3
    assert set(theirs["n_generated"].values()) == {3}
    assert theirs["eos_token_id"] == end, "where lmms-eval stops"


@pytest.mark.transformers4
def test_transformers_4_reads_rope_where_it_looks(found: Any) -> None:
    rope = {name: theirs["rope"] for name, theirs in found("4").items()}
    assert rope["siglip-tied-chatml"] == 500000.0
    assert rope["clip"] == 10000.0


@pytest.mark.parametrize("version", VERSIONS)
def test_peft_puts_the_adapter_on_the_export_of_a_lora_run(
    version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = write_run(tmp_path / "run", trainable=LORA)
    export(str(run), tmp_path / "out")
    first = request.getfixturevalue("transformers4") if version == "4" else None
    folders = {"out": tmp_path / "out", "trained": run / "model"}
    theirs = use_plainly(tmp_path, folders, first)["models"]
    base, adapted, trained = (
        torch.tensor(theirs[name][key])
        for name, key in (("out", "logits"), ("out", "logits_with_adapter"), ("trained", "logits"))
    )
    torch.testing.assert_close(adapted, trained, rtol=1e-4, atol=1e-5)
    assert (base - trained).abs().max() > 1e-3
