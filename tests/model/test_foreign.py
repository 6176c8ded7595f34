from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.nn.functional import gelu, linear

from llava_train.model import foreign_files
from llava_train.model.build import Llava
from llava_train.model.fit import misfits
from llava_train.model.foreign_files import ForeignError, Kind, kind_of
from llava_train.model.mm_projector import projector_from, save_mm_projector
from llava_train.model.weights import HandOffError, check_init, export_model, is_whole_model, load_init
from llava_train.use.foreign import load_foreign
from tests.model import originals
from tests.tiny import encoder_of, model_section, tiny_llava

PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the language model and the vision tower."""
    return originals.save_parts(tmp_path_factory.mktemp("parts"))


@torch.no_grad()
def expected_logits(
    projector: originals.State, language_model: Any = None, tower: Any = None, full: bool = False
) -> torch.Tensor:
    """Logits of "<image>ab" by hand: the features of layer -2 through the projector, before two embeddings."""
    language_model = language_model or originals.language_model()
    tower = tower or originals.vision_tower()
    features = tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 0 if full else 1 :]
    tensors = list(projector.values())
    hidden = linear(features, *tensors[:2])
    if len(tensors) == 4:
        hidden = linear(gelu(hidden), *tensors[2:])
    words = language_model.get_input_embeddings()(torch.tensor([[65, 66]]))
    return language_model(inputs_embeds=torch.cat([hidden, words], dim=1)).logits


@torch.no_grad()
def logits_of(llava: Llava) -> torch.Tensor:
    assert not llava.model.training
    image = llava.model.config.image_token_id
    input_ids = torch.tensor([[image] * llava.n_image_tokens + [65, 66]])
    return llava.model(input_ids=input_ids, pixel_values=PIXELS).logits[..., : originals.N_TOKENS]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def sdpa(llava: Llava) -> Llava:
    llava.model.set_attn_implementation("sdpa")
    return llava


def merged_by_hand(scale: float) -> Any:
    """base + B A * scale."""
    model, adapters = originals.language_model(), originals.adapters()
    for name in {key.rsplit(".", 2)[0] for key in adapters}:
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        layer.weight.data += adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"] * scale
    return model


class TestProjector:
    @pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
    def test_it_goes_out_and_comes_back_bit_for_bit_under_the_original_names(self, kind: str, tmp_path: Path) -> None:
        section = model_section(projector=kind)
        llava = tiny_llava(section)
        layers = llava.model.model.multi_modal_projector
        for parameter in [*layers.linear_1.parameters(), *(layers.linear_2.parameters() if kind != "linear" else ())]:
            torch.nn.init.normal_(parameter)
        save_mm_projector(llava.model, tmp_path / "mm_projector.bin")
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
    def test_any_prefix_is_understood(self, prefix: str, is_linear: bool, width: int) -> None:
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
    def test_other_kinds_are_refused_by_name(self, names: list[str]) -> None:
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
        self, state: originals.State, config: dict | None, message: str, tmp_path: Path
    ) -> None:
        torch.save(state, tmp_path / "mm_projector.bin")
        if config:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **config}))
        with pytest.raises(HandOffError, match=f"^init_from: .*{message}"):
            load_init(str(tmp_path), tiny_llava().model, model_section())


class Code:
    """Runs when a careless reader unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1/0",)


class TestKinds:
    def test_the_content_decides_whatever_the_folders_are_called(
        self, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base, tower = parts
        full = originals.save_full(tmp_path / "llava-hf-lora", tower)
        lora = originals.save_lora(tmp_path / "mm_projector.bin", base, tower)
        (tmp_path / "llava-lora-full").mkdir()
        torch.save(originals.projector(), tmp_path / "llava-lora-full/mm_projector.bin")
        shutil.copy(full / "config.json", tmp_path / "llava-lora-full")
        llava = tiny_llava()
        export_model(llava.model, llava.processor, 1, tmp_path / "liuhaotian")
        shutil.copy(tmp_path / "llava-lora-full/mm_projector.bin", full)
        assert kind_of(full) is Kind.ORIGINAL
        assert kind_of(lora) is Kind.ORIGINAL_LORA
        assert kind_of(tmp_path / "llava-lora-full") is Kind.MM_PROJECTOR
        assert kind_of(full / "mm_projector.bin") is Kind.MM_PROJECTOR
        assert kind_of(tmp_path / "liuhaotian") is Kind.TRANSFORMERS
        assert is_whole_model(str(full))
        assert is_whole_model(str(lora))

    def test_what_is_not_understood_is_listed_beside_what_is(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(
            ForeignError, match=r"vicuna holds config.json, .*; understood are: mm_projector.bin; an original"
        ):
            kind_of(parts[0])
        with pytest.raises(HandOffError, match="holds no finished result .*vicuna holds config.json"):
            check_init(str(parts[0]))
        with pytest.raises(ForeignError, match="holds nothing; understood are"):
            kind_of(tmp_path)
        torch.save({"x": torch.zeros(1)}, tmp_path / "some.bin")
        with pytest.raises(ForeignError, match="no mm_projector"):
            kind_of(tmp_path / "some.bin")

    def test_a_relative_of_llava_is_refused(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        llava = tiny_llava()
        export_model(llava.model, llava.processor, 1, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))
        with pytest.raises(ForeignError, match="holds a llava_next; of transformers' models only llava"):
            kind_of(tmp_path)


class TestFiles:
    def test_a_pickle_with_code_is_refused_and_does_not_run(self, tmp_path: Path) -> None:
        torch.save({"model.mm_projector.weight": Code()}, tmp_path / "mm_projector.bin")
        for use in (check_init, lambda name: load_init(name, tiny_llava().model, model_section())):
            with pytest.raises(HandOffError, match=r"mm_projector.bin holds more than tensors, .* it is not opened"):
                use(str(tmp_path))
        (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.weight": Code()}))
        with pytest.raises(HandOffError, match="holds more than tensors"):
            check_init(str(tmp_path))

    def test_a_shard_with_code_is_refused(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        full = originals.save_full(tmp_path / "full", parts[1], n_shards=2)
        torch.save({"x": Code()}, full / "pytorch_model-00002-of-00002.bin")
        with pytest.raises(ForeignError, match="00002.bin holds more than tensors"):
            load_foreign(full)
        llava = tiny_llava()
        export_model(llava.model, llava.processor, 1, tmp_path / "hf")
        state = load_file(tmp_path / "hf/model.safetensors")
        (tmp_path / "hf/model.safetensors").unlink()
        originals.save_tensors(state, tmp_path / "hf", n_shards=2)
        assert_same(logits_of(load_foreign(tmp_path / "hf")), logits_of(sdpa(llava)))
        torch.save({"x": Code()}, tmp_path / "hf/pytorch_model-00002-of-00002.bin")
        with pytest.raises(ForeignError, match="not a LLaVA model that transformers loads"):
            load_foreign(tmp_path / "hf")

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        torch.save(originals.projector(), tmp_path / "mm_projector.bin")
        content = (tmp_path / "mm_projector.bin").read_bytes()
        (tmp_path / "mm_projector.bin").write_bytes(content[: len(content) // 2])
        with pytest.raises(ForeignError, match="mm_projector.bin"):
            kind_of(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(content[:100])
        with pytest.raises(ForeignError, match="model.safetensors cannot be read"):
            kind_of(tmp_path)

    @pytest.mark.parametrize("file", ["pytorch_model-00002-of-00002.bin", "../elsewhere.bin"])
    def test_a_shard_that_is_missing_or_elsewhere_is_named(
        self, file: str, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        full = originals.save_full(tmp_path / "full", parts[1], n_shards=2)
        (full / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "elsewhere.bin")
        index = full / "pytorch_model.bin.index.json"
        index.write_text(index.read_text().replace("pytorch_model-00002-of-00002.bin", file))
        with pytest.raises(ForeignError, match=f"lacks {file}"):
            load_foreign(full)


def test_what_the_hub_holds_is_told_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    monkeypatch.setattr(
        foreign_files, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name[len("someone/") :])
    )
    assert not is_whole_model("someone/.")
    assert load_init("someone/.", tiny_llava().model, model_section()) == "projector from someone/."


def test_the_file_of_a_run_below_output_is_found(tmp_path: Path) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    check_init(str(tmp_path / "mm_projector.bin"), str(tmp_path))


class TestFull:
    def test_a_tokenizer_of_sentencepiece_and_tied_embeddings(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
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
        llava = load_foreign(full)
        known = SentencePieceProcessor(model_file=str(full / "tokenizer.model")).encode("the quick fox")
        assert llava.tokenizer("the quick fox<image>").input_ids == [1, *known, 290]
        assert llava.model.lm_head.weight is llava.model.get_input_embeddings().weight
        assert torch.equal(llava.model.lm_head.weight[:290], state["model.embed_tokens.weight"])

    @pytest.mark.parametrize("n_shards", [1, 3])
    @pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
    def test_it_computes_what_its_tensors_say(
        self, suffix: str, n_shards: int, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        full = originals.save_full(tmp_path / "full", parts[1], suffix=suffix, n_shards=n_shards)
        llava = load_foreign(full)
        assert_same(logits_of(llava), expected_logits(originals.projector()))
        assert llava.model.dtype == torch.float32
        assert llava.model.config.image_token_id == originals.N_TOKENS
        assert llava.n_image_tokens == 4
        assert llava.processor.image_processor.do_pad
        prompt = llava.processor.apply_chat_template(
            [{"role": "user", "content": "<image>\nWhat?"}], add_generation_prompt=True
        )
        assert prompt.endswith("USER: <image>\nWhat? ASSISTANT:")

    def test_a_tower_that_was_trained_comes_from_the_checkpoint(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        tuned = originals.vision_tower(seed=9)
        extra = {**originals.projector(), **originals.tower_state(tuned)}
        full = originals.save_full(tmp_path / "full", parts[1], extra)
        assert_same(logits_of(load_foreign(full)), expected_logits(originals.projector(), tower=tuned))

    def test_llava_v1_settings(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        changes = {"mm_vision_select_feature": "cls_patch", "image_aspect_ratio": "square", "model_type": "llava_llama"}
        state = originals.projector(linear=True)
        llava = load_foreign(originals.save_full(tmp_path / "full", parts[1], state, **changes))
        assert_same(logits_of(llava), expected_logits(state, full=True))
        assert not llava.processor.image_processor.do_pad
        assert llava.n_image_tokens == 5

    def test_the_dtype_and_the_template_can_be_chosen(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        full = originals.save_full(tmp_path / "full", parts[1])
        llava = load_foreign(full, torch.bfloat16, "llava_v0")
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
        self, changes: dict, message: str, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        full = originals.save_full(tmp_path / "full", parts[1], **changes)
        with pytest.raises(ForeignError, match=message):
            load_foreign(full)

    def test_a_projector_alone_is_no_model(self, tmp_path: Path) -> None:
        torch.save(originals.projector(), tmp_path / "mm_projector.bin")
        with pytest.raises(ForeignError, match="without a model; name it as init_from"):
            load_foreign(tmp_path)


class TestLora:
    @pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
    @pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
    def test_it_equals_the_base_and_the_product_of_its_adapters(
        self, suffix: str, rslora: bool, scale: float, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        lora = originals.save_lora(tmp_path / "x", *parts, suffix=suffix, use_rslora=rslora)
        found = logits_of(load_foreign(lora))
        assert_same(found, expected_logits(originals.projector(seed=5), merged_by_hand(scale)))
        assert (found - expected_logits(originals.projector(seed=5))).abs().max() > 0.1

    def test_its_base_may_be_a_full_checkpoint(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        tuned = originals.vision_tower(seed=9)
        full = originals.save_full(
            tmp_path / "full", parts[1], {**originals.projector(), **originals.tower_state(tuned)}
        )
        lora = originals.save_lora(tmp_path / "x", full, parts[1])
        assert_same(
            logits_of(load_foreign(lora)), expected_logits(originals.projector(seed=5), merged_by_hand(3.0), tuned)
        )

    def test_a_missing_base_is_named_with_the_mend(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        lora = originals.save_lora(tmp_path / "x", "no/such/base", parts[1])
        with pytest.raises(
            ForeignError,
            match="adapters for no/such/base, which cannot be loaded; write the folder .* base_model_name_or_path",
        ):
            load_foreign(lora)

    def test_adapters_that_do_not_fit_are_refused(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        lora = originals.save_lora(tmp_path / "x", *parts)
        torch.save({name: tensor[:0] for name, tensor in originals.adapters().items()}, lora / "adapter_model.bin")
        with pytest.raises(ForeignError, match="do not fit their base model"):
            load_foreign(lora)
        torch.save(dict(list(originals.adapters().items())[:2]), lora / "adapter_model.bin")
        with pytest.raises(ForeignError, match="do not fit their base model: .*down_proj.lora_A"):
            load_foreign(lora)


class TestOfTransformers:
    def test_an_export_comes_back_ready_to_answer(self, tmp_path: Path) -> None:
        llava = tiny_llava()
        export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), tmp_path)
        again = load_foreign(tmp_path)
        assert (again.n_image_tokens, again.processor.chat_template) == (4, llava.processor.chat_template)
        assert torch.equal(logits_of(again), logits_of(sdpa(llava)))

    def test_a_processor_of_old_learns_how_many_tokens_an_image_has(self, tmp_path: Path) -> None:
        llava = tiny_llava()
        llava.processor.chat_template = None
        export_model(llava.model, llava.processor, 1, tmp_path)
        settings = json.loads((tmp_path / "processor_config.json").read_text())
        for key in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"):
            settings.pop(key)
        (tmp_path / "processor_config.json").write_text(json.dumps(settings))
        again = load_foreign(tmp_path)
        inputs = again.processor(images=torch.zeros(3, 28, 28, dtype=torch.uint8), text="<image>", return_tensors="pt")
        assert inputs.input_ids.shape[1] == 4
        assert "ASSISTANT" in again.processor.chat_template


class TestInitFrom:
    def stage_model(self, parts: tuple[Path, Path], folder: Path, **changes: Any) -> Llava:
        section = originals.section_of(*parts, **changes)
        llava = tiny_llava(section)
        row = llava.model.get_input_embeddings().weight[originals.N_TOKENS].clone()
        check_init(str(folder))
        assert load_init(str(folder), llava.model, section) == f"whole model from {folder}"
        assert torch.equal(llava.model.get_input_embeddings().weight[originals.N_TOKENS], row)
        return sdpa(llava)

    def test_a_full_checkpoint(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        tuned = originals.language_model(seed=7)
        full = originals.save_full(tmp_path / "full", parts[1], {**originals.projector(), **tuned.state_dict()})
        assert_same(logits_of(self.stage_model(parts, full)), expected_logits(originals.projector(), tuned))

    def test_a_full_checkpoint_whose_tower_was_trained(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        tuned = originals.vision_tower(seed=9)
        extra = {**originals.projector(), **originals.tower_state(tuned)}
        full = originals.save_full(tmp_path / "full", Path("gone/elsewhere"), extra)
        assert_same(logits_of(self.stage_model(parts, full)), expected_logits(originals.projector(), tower=tuned))

    def test_lora(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        lora = originals.save_lora(tmp_path / "x", *parts)
        expected = expected_logits(originals.projector(seed=5), merged_by_hand(3.0))
        assert_same(logits_of(self.stage_model(parts, lora)), expected)

    def test_a_model_of_transformers(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        full = originals.save_full(tmp_path / "full", parts[1])
        llava = load_foreign(full)
        llava.model.save_pretrained(tmp_path / "hf")
        assert_same(logits_of(self.stage_model(parts, tmp_path / "hf")), expected_logits(originals.projector()))

    @pytest.mark.parametrize("n_added", [-1, 1, 40])
    def test_added_rows_of_the_vocabulary_may_differ(
        self, n_added: int, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        tuned = originals.language_model(seed=7)
        tuned.resize_token_embeddings(originals.N_TOKENS + n_added, mean_resizing=False)
        extra = {**originals.projector(), **tuned.state_dict()}
        full = originals.save_full(tmp_path / "full", parts[1], extra, vocab_size=originals.N_TOKENS + n_added)
        if n_added < 0:
            section = originals.section_of(*parts)
            with pytest.raises(
                HandOffError, match=r"language_model: .*embed_tokens.weight is \[261, 32\] there and \[320, 32\] here"
            ):
                load_init(str(full), tiny_llava(section).model, section)
        else:
            found = logits_of(self.stage_model(parts, full))
            assert_same(found, expected_logits(originals.projector(), tuned)[..., : originals.N_TOKENS])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"projector": "linear"},
                "trained with projector = 'mlp2x_gelu', this stage has 'linear'; set model.projector",
            ),
            ({"vision_feature_layer": -1}, "vision_feature_layer = -2, this stage has -1"),
        ],
    )
    def test_other_features_are_refused(
        self, changes: dict, message: str, parts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        full = originals.save_full(tmp_path / "full", parts[1])
        load_foreign(full).model.save_pretrained(tmp_path / "hf")
        section = originals.section_of(*parts, **changes)
        for folder in (full, tmp_path / "hf"):
            with pytest.raises(HandOffError, match=message):
                load_init(str(folder), tiny_llava(section).model, section)

    def test_another_tower_is_refused(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        full = originals.save_full(tmp_path / "full", Path("openai/clip-vit-large-patch14-336"))
        section = originals.section_of(*parts)
        with pytest.raises(
            HandOffError, match="vision_tower = 'openai/clip-vit-large-patch14-336', this stage has .*clip-tiny"
        ):
            load_init(str(full), tiny_llava(section).model, section)


SHAPES = st.dictionaries(
    st.sampled_from(["a.weight", "b.bias", "model.embed_tokens.weight", "lm_head.weight"]),
    st.tuples(st.integers(1, 400), st.integers(1, 2)),
)


@given(SHAPES)
def test_every_model_fits_itself(shapes: dict) -> None:
    assert not list(misfits(shapes, shapes, 10_000))


@given(ours=SHAPES, theirs=SHAPES, n_own=st.integers(0, 400))
def test_what_fits_can_be_copied(ours: dict, theirs: dict, n_own: int) -> None:
    if list(misfits(ours, theirs, n_own)):
        return
    assert ours.keys() == theirs.keys()
    for name, shape in ours.items():
        if shape != theirs[name]:
            assert name in ("model.embed_tokens.weight", "lm_head.weight")
            assert theirs[name][0] >= n_own
            assert abs(shape[0] - theirs[name][0]) <= 128
            assert shape[1] == theirs[name][1]
