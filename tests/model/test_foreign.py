from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llava_train.errors import Note
from llava_train.model.foreign_files import ForeignError
from llava_train.model.weights import export_model
from llava_train.template_marks import show_marks
from llava_train.use.loading import load_llava
from tests.model import originals
from tests.model.originals import assert_same, expected_logits, logits_of, merged_by_hand, sdpa
from tests.tiny import encoder_of, tiny_llava


def test_a_tokenizer_of_sentencepiece_and_tied_embeddings(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """The published checkpoints hold `tokenizer.model` alone."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"the quick brown fox {i} asks an assistant {i * 7}" for i in range(300)))
    SentencePieceTrainer.train(
        input=str(words), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, byte_fallback=True, model_type="bpe", minloglevel=2
    )  # fmt: skip
    full = originals.save_full(tmp_path / "full", parts[1], tie_word_embeddings=True, vocab_size=290)
    (full / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "tokenizer.model", full)
    (full / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    model = originals.language_model()
    model.resize_token_embeddings(290, mean_resizing=False)
    state = {**model.state_dict(), **originals.projector()}
    state.pop("lm_head.weight")
    originals.save_tensors(state, full)
    llava = load_llava(full)
    known = SentencePieceProcessor(model_file=str(full / "tokenizer.model")).encode("the quick fox")
    assert llava.tokenizer("the quick fox<image>").input_ids == [1, *known, 290]
    assert llava.model.lm_head.weight is llava.model.get_input_embeddings().weight
    assert torch.equal(llava.model.lm_head.weight[:290], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_it_computes_what_its_tensors_say(suffix: str, n_shards: int, parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1], suffix=suffix, n_shards=n_shards)
    llava = load_llava(full)
    assert_same(logits_of(llava), expected_logits(originals.projector()))
    assert llava.model.dtype == torch.float32
    assert llava.model.config.image_token_id == originals.N_TOKENS
    assert llava.n_image_tokens == 4
    assert llava.processor.image_processor.do_pad
    prompt = llava.processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True
    )
    assert prompt.endswith("USER: <image>\nWhat? ASSISTANT:")


def test_a_tower_that_was_trained_comes_from_the_checkpoint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = originals.vision_tower(seed=9)
    extra = {**originals.projector(), **originals.tower_state(tuned)}
    full = originals.save_full(tmp_path / "full", parts[1], extra)
    assert_same(logits_of(load_llava(full)), expected_logits(originals.projector(), tower=tuned))


def test_llava_v1_settings(parts: tuple[Path, Path], tmp_path: Path) -> None:
    changes = {"mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "square", "model_type": "llava_llama"}
    state = originals.projector(linear=True)
    llava = load_llava(originals.save_full(tmp_path / "full", parts[1], state, **changes))
    assert_same(logits_of(llava), expected_logits(state, full=True))
    assert not llava.processor.image_processor.do_pad
    assert llava.n_image_tokens == 5


def test_the_dtype_and_the_template_can_be_chosen(parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1])
    llava = load_llava(full, torch.bfloat16, chat_template="llava_v0")
    assert {parameter.dtype for parameter in llava.model.parameters()} == {torch.bfloat16}
    assert "###" in llava.processor.chat_template


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "tokens around each image"),
        ({"image_aspect_ratio": "anyres"}, "tiles"),
        ({"mm_vision_select_feature": "cls"}, "selects features by 'cls'"),
        ({"hidden_size": "wide"}, "config.json of a llava is not understood"),
        ({"model_type": "clip"}, "is that of a clip, not of a language model"),
        ({"mm_vision_tower": None}, "names no vision tower"),
        ({"mm_vision_tower": "no/such/tower"}, "a folder may stand there"),
        ({"model_type": "llava_martian"}, "of a llava_martian is not understood"),
        ({"num_hidden_layers": 3}, "9 missing tensors, such as model.layers.2"),
        ({"intermediate_size": 128}, "does not fit its config.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_computed_is_refused(
    changes: dict, message: str, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    full = originals.save_full(tmp_path / "full", parts[1], **changes)
    with pytest.raises(ForeignError, match=message):
        load_llava(full)


def test_a_projector_alone_is_no_model(tmp_path: Path) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    with pytest.raises(ForeignError, match="without a model; name it as init_from"):
        load_llava(tmp_path)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_it_equals_the_base_and_the_product_of_its_adapters(
    suffix: str, rslora: bool, scale: float, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    lora = originals.save_lora(tmp_path / "x", *parts, suffix=suffix, use_rslora=rslora)
    found = logits_of(load_llava(lora))
    assert_same(found, expected_logits(originals.projector(seed=5), merged_by_hand(scale)))
    assert (found - expected_logits(originals.projector(seed=5))).abs().max() > 0.1


def test_its_base_may_be_a_full_checkpoint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = originals.vision_tower(seed=9)
    full = originals.save_full(tmp_path / "full", parts[1], {**originals.projector(), **originals.tower_state(tuned)})
    lora = originals.save_lora(tmp_path / "x", full, parts[1])
    assert_same(logits_of(load_llava(lora)), expected_logits(originals.projector(seed=5), merged_by_hand(3.0), tuned))


def test_whatever_else_was_trained_beside_the_adapters_counts(parts: tuple[Path, Path], tmp_path: Path) -> None:
    lora, model, tuned = (
        originals.save_lora(tmp_path / "x", *parts),
        merged_by_hand(3.0),
        originals.vision_tower(seed=9),
    )
    model.model.norm.weight.data.mul_(2)
    trained = {
        **originals.projector(seed=5),
        **originals.tower_state(tuned),
        "model.norm.weight": model.model.norm.weight.data,
    }
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in trained.items()}, lora / "non_lora_trainables.bin"
    )
    assert_same(logits_of(load_llava(lora)), expected_logits(originals.projector(seed=5), model, tuned))
    torch.save({**trained, "model.other.weight": torch.zeros(1)}, lora / "non_lora_trainables.bin")
    with pytest.raises(ForeignError, match="holds model.other.weight, which .* does not have"):
        load_llava(lora)


def test_a_missing_base_is_named_with_the_mend(parts: tuple[Path, Path], tmp_path: Path) -> None:
    lora = originals.save_lora(tmp_path / "x", "no/such/base", parts[1])
    with pytest.raises(
        ForeignError,
        match="adapters for no/such/base, which cannot be loaded; write the folder .* base_model_name_or_path",
    ):
        load_llava(lora)


def test_adapters_that_do_not_fit_are_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    lora = originals.save_lora(tmp_path / "x", *parts)
    torch.save({name: tensor[:0] for name, tensor in originals.adapters().items()}, lora / "adapter_model.bin")
    with pytest.raises(ForeignError, match="do not fit their base model"):
        load_llava(lora)
    torch.save(dict(list(originals.adapters().items())[:2]), lora / "adapter_model.bin")
    with pytest.raises(ForeignError, match="do not fit their base model: .*down_proj.lora_A"):
        load_llava(lora)


def test_an_export_comes_back_ready_to_answer(tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path)
    again = load_llava(tmp_path)
    assert (again.n_image_tokens, show_marks(again.processor.chat_template)) == (4, llava.processor.chat_template)
    assert torch.equal(logits_of(again), logits_of(sdpa(llava)))


def test_a_processor_of_old_learns_how_many_tokens_an_image_has(tmp_path: Path) -> None:
    llava = tiny_llava()
    llava.processor.chat_template = None
    export_model(llava.model, llava.processor, 1, tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    for key in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
        settings.pop(key)
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    again = load_llava(tmp_path)
    inputs = again.processor(images=torch.zeros(3, 28, 28, dtype=torch.uint8), text="<image>", return_tensors="pt")
    assert inputs.input_ids.shape[1] == 4
    assert "ASSISTANT" in again.processor.chat_template


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("number", [5, 99999, None])
def test_the_token_of_a_picture_is_the_tokenizers(number: int | None, tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path)
    right = llava.model.config.image_token_id
    change_json(tmp_path / "config.json", lambda config: config.update(image_token_index=number or 32000))
    if number is None:  # transformers then takes that of LLaVA-1.5
        change_json(tmp_path / "config.json", lambda config: config.pop("image_token_index"))
    with pytest.warns(Note, match=rf"is token {number or 32000} \(image_token_index\), its tokenizer says {right};"):
        again = load_llava(tmp_path)
    assert torch.equal(logits_of(again), logits_of(sdpa(llava)))
    assert again.model.config.image_token_index == right, "what is exported again is right"


def test_an_image_has_as_many_tokens_as_the_tower_gives(tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path)
    change_json(tmp_path / "config.json", lambda config: config.update(image_seq_length=576))
    change_json(tmp_path / "processor_config.json", lambda config: config.update(patch_size=7))
    again = load_llava(tmp_path)
    assert (again.model.config.image_seq_length, again.processor.patch_size) == (4, 14)
    assert torch.equal(logits_of(again), logits_of(sdpa(llava)))


def without_image_token(content: dict[str, Any]) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "tokenizer.json",
            without_image_token,
            "its tokenizer has no token <image>, where pictures go; copy the token",
        ),
        ("config.json", {"vision_feature_layer": -9}, "config.json: vision_feature_layer: -9 is out of range"),
        ("config.json", {"vision_feature_select_strategy": "patch"}, "vision_feature_select_strategy"),
        ("config.json", {"text_config.vocab_size": 100}, r"is \[\d+, 32\] in the file, and would be \[100, 32\]"),
        ("config.json", {"vision_config.patch_size": 7}, "config.json does not fit the weights: .*patch_embedding"),
        ("config.json", {"vision_config.image_size": 56}, "config.json does not fit the weights: .*position_embedding"),
        ("config.json", {"vision_config": "none"}, "is not a LLaVA model that transformers loads"),
        (
            "processor_config.json",
            {"image_processor.crop_size": {"height": 56, "width": 56}},
            "makes pictures of 56 x 56 pixels, but its vision tower takes 28 x 28 pixels in patches of 14; correct crop",
        ),
        ("processor_config.json", {"image_processor.crop_size": {"height": 28, "width": 56}}, "makes no square"),
        ("processor_config.json", {"image_processor.crop_size": None}, "makes no square"),
    ],
)
def test_files_that_disagree_are_refused_by_name(file: str, change: Any, message: str, tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path)

    def set_keys(content: dict[str, Any]) -> None:
        for key, value in change.items():
            *above, last = key.split(".")
            section = content
            for name in above:
                section = section[name]
            section[last] = value

    change_json(tmp_path / file, change if callable(change) else set_keys)
    with pytest.raises(ForeignError, match=message) as raised:
        load_llava(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("n_missing", [1, 63])
def test_a_model_with_fewer_embeddings_than_its_tokenizer_has_tokens_is_refused(n_missing: int, tmp_path: Path) -> None:
    llava = tiny_llava()
    n_tokens, processor = len(llava.tokenizer), llava.processor
    export_model(llava.model, processor, encoder_of(llava).end_of_turn_id(), tmp_path)
    llava.model.resize_token_embeddings(n_tokens - n_missing)
    llava.model.save_pretrained(tmp_path)
    with pytest.raises(
        ForeignError, match=f"has {n_tokens} tokens, but the model has embeddings for {n_tokens - n_missing}"
    ):
        load_llava(tmp_path)
