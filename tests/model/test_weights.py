from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_train.config import RandomLanguageModel, RandomVisionTower, TrainableSection
from llava_train.files import write_manifest
from llava_train.model.trainable import set_trainable
from llava_train.model.weights import HandOffError, check_init, export_model, load_init, save_projector
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, encoder_of, model_section, tiny_llava


def randomize(model: torch.nn.Module) -> None:
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished stage 1 with a projector of its own."""
    llava = tiny_llava()
    randomize(llava.model)
    save_projector(llava.model, model_section(), tmp_path / "run" / "model")
    write_manifest(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.mark.parametrize("below", ["", "model"])
def test_a_projector_is_handed_on_bit_for_bit_and_its_hash_is_told(run_folder: Path, below: str) -> None:
    llava = tiny_llava()
    told = load_init(str(run_folder / below), llava.model, model_section())
    card = json.loads((run_folder / "model/projector.json").read_text())
    assert card["sha256"][:16] in told
    again = tiny_llava()
    load_init(str(run_folder), again.model, model_section())
    state, other = (m.model.model.multi_modal_projector.state_dict() for m in (llava, again))
    assert all(torch.equal(state[name], other[name]) for name in state)
    fresh = tiny_llava().model.model.multi_modal_projector.state_dict()
    assert not torch.equal(state["linear_1.weight"], fresh["linear_1.weight"])


def test_a_projector_that_changed_afterwards_is_refused(run_folder: Path) -> None:
    file = run_folder / "model/projector.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(HandOffError, match="is not a finished result .projector.safetensors has another checksum"):
        load_init(str(run_folder), tiny_llava().model, model_section())
    write_manifest(run_folder / "model")
    with pytest.raises(HandOffError, match=r"projector.safetensors has sha256 .* the file changed after the stage"):
        load_init(str(run_folder), tiny_llava().model, model_section())


def test_a_projector_of_other_parts_is_refused(run_folder: Path) -> None:
    section = model_section(vision_feature_layer=-1)
    with pytest.raises(HandOffError, match="trained with vision_feature_layer = -2, this stage has -1; use the same"):
        load_init(str(run_folder), tiny_llava(section).model, section)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HandOffError, match="holds no finished result .*; run that stage to its end first"):
        load_init(str(tmp_path), tiny_llava().model, model_section())


def test_a_result_that_was_not_finished_is_refused(run_folder: Path) -> None:
    (run_folder / "model/COMPLETE").unlink()
    with pytest.raises(HandOffError, match="is not a finished result .no readable COMPLETE manifest.; run that stage"):
        load_init(str(run_folder), tiny_llava().model, model_section())


def test_a_run_that_does_not_exist_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(HandOffError, match="init_from: there is no run runs/nowhere; run that stage to its end first"):
        check_init("runs/nowhere", "runs")


def test_a_folder_that_does_not_exist_is_refused() -> None:
    with pytest.raises(HandOffError, match="init_from: no/such/run: there is no such folder"):
        load_init("no/such/run", tiny_llava().model, model_section())


def test_a_whole_model_can_be_continued(tmp_path: Path) -> None:
    llava = tiny_llava()
    randomize(llava.model)
    with torch.no_grad():
        llava.model.lm_head.weight.add_(1)
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path / "run" / "model")
    write_manifest(tmp_path / "run" / "model")
    again = tiny_llava()
    assert "whole model from" in load_init(str(tmp_path / "run"), again.model, model_section())
    state, other = llava.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_whole_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path / "model")
    wider = RandomLanguageModel(config={**LANGUAGE_MODEL, "hidden_size": 64})
    section = model_section(language_model=wider)
    with pytest.raises(HandOffError, match=r"the model in .* does not fit the parts of the model section"):
        load_init(str(tmp_path / "model"), tiny_llava(section).model, section)


@pytest.mark.parametrize(
    "changes",
    [
        {"projector": "linear"},
        {"vision_feature_select": "full"},
        {"language_model": RandomLanguageModel(config=LANGUAGE_MODEL, seed=5)},
        {"vision_tower": RandomVisionTower(config=VISION_TOWER, seed=5)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_part_that_a_projector_joins_must_be_the_same(run_folder: Path, changes: dict) -> None:
    section = model_section(**changes)
    with pytest.raises(HandOffError, match=f"trained with {next(iter(changes))} = .* use the same parts in both"):
        load_init(str(run_folder), tiny_llava(section).model, section)


def test_a_part_is_the_same_under_its_hub_id_and_in_a_folder(tmp_path: Path) -> None:
    llava = tiny_llava()
    save_projector(llava.model, model_section(language_model="lmsys/vicuna-7b-v1.5"), tmp_path)
    told = load_init(str(tmp_path), llava.model, model_section(language_model="/models/vicuna-7b-v1.5"))
    assert told.startswith("projector from")


def test_adapters_are_merged_into_the_export_and_kept_beside_it(tmp_path: Path) -> None:
    llava = tiny_llava()
    lora = {"lr": 1e-4, "lora": {"rank": 2, "alpha": 4}}
    peft_model = set_trainable(llava.model, TrainableSection(projector={"lr": 1e-3}, language_model=lora))
    for name, parameter in llava.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    input_ids = torch.arange(20)[None]
    llava.model.model.language_model.set_attn_implementation("sdpa")
    expected = llava.model(input_ids=input_ids).logits
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path / "model", peft_model)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(loaded(input_ids=input_ids).logits, tiny_logits(input_ids), atol=1e-2)
    assert {"adapter_config.json", "adapter_model.safetensors", "projector.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }


def tiny_logits(input_ids: torch.Tensor) -> torch.Tensor:
    """What the model says before any training."""
    model = tiny_llava().model
    model.model.language_model.set_attn_implementation("sdpa")
    return model(input_ids=input_ids).logits


def test_an_exported_model_says_where_answers_end_and_serves_older_readers(tmp_path: Path) -> None:
    llava = tiny_llava(model_section(chat_template="chatml"))
    end = encoder_of(llava).end_of_turn_id()
    export_model(llava.model, llava.processor, end, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert llava.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert generation["eos_token_id"][0] == end
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]
    assert "packed" not in json.dumps(config)
