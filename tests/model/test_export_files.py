"""The files of an exported model, against what their readers look for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils.chat_template_utils import render_jinja_template

from llava_train.config import CHAT_TEMPLATES, RandomLanguageModel, RandomVisionTower
from llava_train.data.chat_templates import TemplateError, load_template, render
from llava_train.data.samples import Turn
from llava_train.model.build import Llava
from llava_train.model.export_files import write_model
from llava_train.model.export_template import portable
from llava_train.template_marks import has_marks, hide_marks, show_marks
from tests.data.chat_tokenizers import TOKENIZERS
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, encoder_of, model_section, tiny_llava
from tests.use.exports import LLAMA3_ROPE, llava_of

CONVERSATION = (
    Turn("system", "Be kind."),
    Turn("user", "<image>\nIs it?"),
    Turn("assistant", "Yes."),
    Turn("user", "A?"),
)
LLAVA_HF = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As the templates of llava-hf: lists of parts only."""
TEXTS_ONLY = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""As a user may write one."""


def written(llava: Llava, folder: Path) -> Path:
    write_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), folder)
    return folder


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def read(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / name).read_text()))


def llava_hf_keys(n_vision_layers: int, n_layers: int) -> set[str]:
    """Keys of llava-hf/llava-1.5-7b-hf: those of transformers 4's CLIPVisionModel and LlamaForCausalLM, with a prefix.

    Buffers that transformers computes (`position_ids`, `inv_freq`) are not saved since version 4.31.
    """
    vision = "vision_tower.vision_model"
    keys = {f"{vision}.embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight")}
    keys |= {f"{vision}.embeddings.position_embedding.weight"}
    with_bias = [f"{vision}.pre_layrnorm", f"{vision}.post_layernorm"]  # the first is misspelt in CLIP
    for i in range(n_vision_layers):
        parts = [
            *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
            "layer_norm1",
            "layer_norm2",
            "mlp.fc1",
            "mlp.fc2",
        ]
        with_bias += [f"{vision}.encoder.layers.{i}.{part}" for part in parts]
    with_bias += [f"multi_modal_projector.linear_{i}" for i in (1, 2)]
    keys |= {f"{name}.{kind}" for name in with_bias for kind in ("weight", "bias")}
    for i in range(n_layers):
        parts = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
        parts += ["input_layernorm", "post_attention_layernorm"]
        keys |= {f"language_model.model.layers.{i}.{part}.weight" for part in parts}
    return keys | {f"language_model.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head")}


def as_vllm_reads(key: str) -> str:
    """vLLM's own rules for LLaVA (`hf_to_vllm_mapper`), which leave the keys of llava-hf alone."""
    rules = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    return next((new + key.removeprefix(old) for old, new in rules.items() if key.startswith(old)), key)


def test_clip_llava_1_5_has_exactly_the_keys_of_llava_hf(tmp_path: Path) -> None:
    """As many layers as CLIP-L and Vicuna-7B, of small width: the keys say nothing of the width."""
    section = model_section(
        vision_tower=RandomVisionTower(config={**VISION_TOWER, "num_hidden_layers": 24}),
        language_model=RandomLanguageModel(config={**LANGUAGE_MODEL, "num_hidden_layers": 32}),
    )
    keys = keys_of(written(tiny_llava(section), tmp_path / "out"))
    assert keys == llava_hf_keys(24, 32)
    assert len(keys) == 3 + 2 * (2 + 24 * 8 + 2) + 32 * 9 + 3
    assert {as_vllm_reads(key) for key in keys} == keys


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"])
def test_a_model_that_was_loaded_is_written_under_the_same_keys(tmp_path: Path, tower: str) -> None:
    llava = llava_of(tower, tie_word_embeddings=True)
    first = keys_of(written(llava, tmp_path / "first"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "first")
    again = written(Llava(loaded, llava.processor, llava.n_image_tokens), tmp_path / "again")
    assert keys_of(again) == first
    assert "language_model.lm_head.weight" not in first
    assert read(again, "config.json") == read(tmp_path / "first", "config.json")


def test_the_config_holds_what_older_readers_and_servers_look_for(tmp_path: Path) -> None:
    config = read(written(llava_of(rope_parameters=LLAMA3_ROPE), tmp_path / "out"), "config.json")
    text = config["text_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500000.0
    assert text["rope_scaling"] == {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert config["torch_dtype"] == config["dtype"] == text["dtype"] == config["vision_config"]["dtype"] == "float32"
    assert "image_token_index" in config, "as vLLM calls it"
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.text_config
    assert reloaded.rope_parameters == LLAMA3_ROPE


def test_generation_stops_at_the_turn_and_where_the_language_model_does(tmp_path: Path) -> None:
    llava = llava_of(template="chatml")
    llava.model.generation_config.eos_token_id = [7, 8]
    llava.model.generation_config.update(do_sample=False, temperature=0.2, top_p=0.9)
    config = read(written(llava, tmp_path / "out"), "generation_config.json")
    end, eos = (llava.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>"))
    assert config["eos_token_id"] == [end, 7, 8, eos]
    assert config["pad_token_id"] == llava.tokenizer.pad_token_id
    assert not {"temperature", "top_p", "_from_model_config", "stop_strings"} & config.keys()


def test_processor_files_of_both_versions_say_the_same(tmp_path: Path) -> None:
    out = written(llava_of(), tmp_path / "out")
    new, old = read(out, "processor_config.json"), read(out, "preprocessor_config.json")
    assert old == {**new["image_processor"], "processor_class": "LlavaProcessor"}
    assert old["image_processor_type"] == "LlavaImageProcessor", "a name that both versions have"
    assert old["do_pad"] is True
    assert read(out, "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read(out, "chat_template.json")["chat_template"] == (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "template, eos", [("chatml", "<|im_end|>"), ("vicuna_v1", "</s>"), ("plain", "</s>"), ("phi3", "<|end|>")]
)
def test_the_end_of_turn_is_the_tokenizers_and_that_changes_no_text(tmp_path: Path, template: str, eos: str) -> None:
    """lmms-eval stops there. `phi3` writes the end of a sequence, too, after a finished conversation."""
    llava = llava_of(template="vicuna_v1")
    llava.tokenizer.add_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    llava.processor.chat_template = load_template(template, llava.tokenizer)
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    text = llava.processor.apply_chat_template(chat)
    out = written(llava, tmp_path / "out")
    assert read(out, "tokenizer_config.json")["eos_token"] == eos
    assert AutoProcessor.from_pretrained(out).apply_chat_template(chat) == text


# Chat templates


def each_template(tokenizer: str) -> list[str]:
    found = []
    for name in CHAT_TEMPLATES:
        try:
            found.append(load_template(name, TOKENIZERS[tokenizer]))
        except TemplateError:
            continue
    return found


def plainly(template: str, tokenizer: Any, turns: tuple[Turn, ...], as_parts: bool = False) -> str:
    """As a reader without transformers renders it."""

    def content(text: str) -> Any:
        image, _, rest = text.rpartition("<image>\n")
        texts = [{"type": "text", "text": rest}]
        return ([{"type": "image"}, *texts] if image or text != rest else texts) if as_parts else text

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": turn.role, "content": content(turn.text)} for turn in turns]
    tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


def takes_parts(template: str) -> bool:
    """How vLLM tells: a loop over the content of a message, itself of a loop over the messages."""
    tree = jinja2.Environment().parse(template)
    loops = list(tree.find_all(nodes.For))
    messages = {
        loop.target.name for loop in loops if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    }
    return any(
        isinstance(loop.iter, nodes.Getattr) and loop.iter.attr == "content" and loop.iter.node.name in messages
        for loop in loops
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "llama", "llama3"])
def test_hidden_marks_need_no_transformers_and_change_no_text(tokenizer: str) -> None:
    templates = each_template(tokenizer)
    assert len(templates) > 5
    for template in templates:
        hidden = hide_marks(template)
        text, spans = render(template, TOKENIZERS[tokenizer], CONVERSATION, prompt=True)
        assert plainly(hidden, TOKENIZERS[tokenizer], CONVERSATION) == text
        assert plainly(hidden, TOKENIZERS[tokenizer], CONVERSATION, as_parts=True) == text
        assert takes_parts(hidden)
        assert render(hidden, TOKENIZERS[tokenizer], CONVERSATION, prompt=True) == (text, spans), "shown to training"
        with pytest.raises(jinja2.TemplateSyntaxError):
            plainly(template, TOKENIZERS[tokenizer], CONVERSATION)


@pytest.mark.parametrize("mark", ["{% generation %}", "{%- generation -%}", "{%-generation%}", "{%+ endgeneration -%}"])
def test_marks_come_back(mark: str) -> None:
    assert re.sub(" ", "", show_marks(hide_marks(mark))) == mark.replace(" ", "")
    assert has_marks(hide_marks(mark)) and has_marks(mark)
    assert not has_marks("{# a generation of #}{{ generation }}")


@pytest.mark.parametrize("template", [LLAVA_HF, TEXTS_ONLY], ids=["parts only", "texts only"])
def test_a_template_that_takes_one_kind_of_content_takes_both_when_exported(template: str) -> None:
    llava = llava_of()
    llava.processor.chat_template = template
    exported = portable(template, llava.processor)
    turns = CONVERSATION[1:]
    texts, parts = (plainly(exported, llava.tokenizer, turns, as_parts) for as_parts in (False, True))
    assert texts.split() == parts.split()
    assert "<image>" in texts and "'type'" not in texts + parts
    own = template if template is TEXTS_ONLY else portable(template, llava.processor)
    [expected], _ = render_jinja_template(
        conversations=[[{"role": turn.role, "content": turn.text} for turn in turns]],
        chat_template=own,
        add_generation_prompt=True,
        **llava.tokenizer.special_tokens_map,
    )
    assert texts == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}", None])
def test_a_template_that_cannot_ask_about_a_picture_costs_no_run(template: str | None, tmp_path: Path) -> None:
    llava = llava_of()
    llava.processor.chat_template = template
    write_model(llava.model, llava.processor, 5, tmp_path)
    found = tmp_path / "chat_template.jinja"
    assert (found.read_text() if found.exists() else None) == template
