"""Templates render what the language models were trained with; `auto` finds them; a user's own file is checked."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_train.config import CHAT_TEMPLATES
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import TemplateError, load_template, unlike_own
from llava_train.data.samples import Turn
from tests.data.chat_tokenizers import SMOLLM2, TOKENIZERS

# What language models ship, written down from the formats: the name of ours, its tokenizer, and their own jinja.
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
)
CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
LLAMA3_PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
OWN = {
    "qwen2.5": (
        "chatml",
        "smollm2 or bytes",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
        "helpful assistant.<|im_end|>\n' }}{% endif %}{% for m in messages %}" + CHATML + "{% endfor %}" + CHATML_PROMPT,
    ),
    "qwen3 instruct": ("chatml", "bytes", "{% for m in messages %}" + CHATML + "{% endfor %}" + CHATML_PROMPT),
    "llama 2": (
        "llama2",
        "llama",
        SPLIT_SYSTEM + "{% for m in messages %}" + ALTERNATE + "{% if loop.first and s is defined %}"
        "{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set c = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "llama 3": ("llama3", "llama3", "{{ bos_token }}{% for m in messages %}" + LLAMA3 + "{% endfor %}" + LLAMA3_PROMPT),
    "llama 3.1": (
        "llama3",
        "llama3",
        "{{ bos_token }}{% set s = '' %}{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' + s + '<|eot_id|>' }}"
        "{% for m in messages %}" + LLAMA3 + "{% endfor %}" + LLAMA3_PROMPT,
    ),
    "mistral v0.2": (
        "mistral",
        "llama",
        SPLIT_SYSTEM + "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
        "{{ ' [INST] ' + (s + '\n\n' if loop.first and s is defined else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ),
    "mistral v0.3": (
        "mistral_v3",
        "llama",
        SPLIT_SYSTEM + "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
        "{{ '[INST] ' + (s + '\n\n' if loop.last and s is defined else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    ),
    "phi 3.5": (
        "phi3",
        "bytes",
        "{% for m in messages %}{% if m.role == 'system' and m.content %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
        "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% elif m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "gemma 2": (
        "gemma",
        "llama",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "gemma 3": (
        "gemma",
        "llama",
        SPLIT_SYSTEM + "{{ bos_token }}{% for m in messages %}" + ALTERNATE
        + "{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + "
        "(s + '\n\n' if loop.first and s is defined else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "zephyr": (
        "zephyr",
        "llama",
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
        "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
        "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    ),
}  # fmt: skip
TURNS = [
    {"role": "user", "content": "<image>\nWhat is “it”?"},
    {"role": "assistant", "content": "A cat 🐈."},
    {"role": "user", "content": "And:\n1. this?"},
    {"role": "assistant", "content": "It's 42"},
]
SYSTEM = {"role": "system", "content": "Be brief; it's {{ late }}."}
CONVERSATIONS = [(TURNS[:n], n % 2 == 1) for n in range(1, 5)]
WITH_SYSTEM = [([SYSTEM, *turns], prompt) for turns, prompt in CONVERSATIONS]


def model_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """A tokenizer that carries a language model's own template."""
    _, kinds, own = OWN[model]
    tokenizer = copy.deepcopy(TOKENIZERS[kinds.split(" ")[-1]])
    tokenizer.chat_template = own
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list[dict], prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt, tokenize=False)


def conversations_of(model: str) -> list[tuple[list[dict], bool]]:
    """Those that the model's own template takes and that ours renders alike."""
    if model == "gemma 2":  # refuses a system turn
        return CONVERSATIONS
    if model == "mistral v0.3":  # moves the system text to the newest question
        return [*CONVERSATIONS, WITH_SYSTEM[0]]
    return CONVERSATIONS + WITH_SYSTEM


@pytest.mark.parametrize("model", OWN)
def test_auto_renders_what_the_language_model_was_trained_with(model: str) -> None:
    tokenizer = model_tokenizer(model)
    template = load_template("auto", tokenizer)
    bos = tokenizer.bos_token if model == "zephyr" else ""  # which the tokenizer adds, not the template
    for messages, prompt in conversations_of(model):
        assert rendered(tokenizer, template, messages, prompt) == bos + rendered(tokenizer, None, messages, prompt)


@pytest.mark.parametrize("model", [model for model in OWN if model not in ("qwen2.5", "llama 3.1")])
def test_a_name_renders_what_the_language_model_was_trained_with(model: str) -> None:
    tokenizer = model_tokenizer(model)
    assert load_template(OWN[model][0], tokenizer) == load_template("auto", tokenizer)


@pytest.mark.parametrize("model", ["qwen2.5", "llama 3.1"])
def test_a_name_has_no_system_text_of_one_model(model: str) -> None:
    tokenizer, name = model_tokenizer(model), OWN[model][0]
    text = rendered(tokenizer, load_template(name, tokenizer), TURNS, False)
    assert "system" not in text
    assert rendered(tokenizer, None, TURNS, False).endswith(text.removeprefix(tokenizer.bos_token))


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs parts/smollm2-135m-instruct")
def test_auto_renders_what_smollm2_was_trained_with() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    template = load_template("auto", tokenizer)
    for messages, prompt in CONVERSATIONS + WITH_SYSTEM:
        assert rendered(tokenizer, template, messages, prompt) == rendered(tokenizer, None, messages, prompt)


def test_auto_takes_the_default_of_several_templates_of_a_tokenizer() -> None:
    tokenizer = model_tokenizer("zephyr")
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": OWN["mistral v0.2"][2]}
    assert load_template("auto", tokenizer) == load_template("mistral", tokenizer)


def test_auto_follows_a_template_that_writes_a_begin_of_sequence_token_itself() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["bytes"])  # adds none to a text
    tokenizer.chat_template = OWN["llama 2"][2]
    text = rendered(tokenizer, load_template("auto", tokenizer), TURNS, False)
    assert text == rendered(tokenizer, None, TURNS, False)
    assert text.startswith("<s>[INST]") and text.count("<s>") == 2


def test_auto_finds_the_system_text_of_a_vicuna() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["llama"])
    tokenizer.chat_template = load_template("vicuna_v1", tokenizer).replace("curious user", r"curious \"Ü🐈\n\\user\"")
    text = rendered(tokenizer, load_template("auto", tokenizer), TURNS, False)
    assert text == rendered(tokenizer, None, TURNS, False)


FITTING = "name one that fits the tokenizer (plain, vicuna_v1, llava_v0, llama2, llama3, mistral, mistral_v3"
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' and loop.index0 > ns.last and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}" + CHATML + "{% endif %}{% endfor %}" + CHATML_PROMPT
)
"""As Qwen3's, which thinks before the newest answer only."""
QWEN3_THINKING = OWN["qwen3 instruct"][2].replace("assistant\n' }}", "assistant\n<think>\n' }}")
LLAMA32 = OWN["llama 3.1"][2].replace("26 Jul 2024", "' + strftime_now('%d %b %Y') + '")
SMOLLM3 = (
    "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + OWN["qwen3 instruct"][2]
)
DOES_NOT_KNOW = "auto knows no template that renders as the language model's own does; "


def tokenizer_with(own: str | None, kind: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(TOKENIZERS[kind])
    tokenizer.chat_template = own
    return tokenizer


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (None, f"auto finds no chat template in the tokenizer of the language model; {FITTING}"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", DOES_NOT_KNOW + FITTING),
        ("{% for m in messages %}", DOES_NOT_KNOW + FITTING),
        ("{{ messages[0].content.nothing.at_all }}", DOES_NOT_KNOW + FITTING),
        (OWN["llama 3"][2].replace("<|eot_id|>", "{{ strftime_now('%d %b') }}<|eot_id|>"), "writes the date of today"),
        (load_template("llava_v0", TOKENIZERS["llama3"]), DOES_NOT_KNOW),
    ],
)
def test_auto_refuses_what_it_does_not_know_with_the_names(own: str | None, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        load_template("auto", tokenizer_with(own, "llama3"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("own", "kind", "nearest", "lost"),
    [
        (QWEN3, "bytes", "chatml", r"'<think>\n\n</think>\n\n'"),
        (QWEN3_THINKING, "bytes", "chatml", r"'<think>\n'"),
        (LLAMA32, "llama3", "llama3", "Cutting Knowledge Date: December 2023"),
        (SMOLLM3, "bytes", "chatml", "Today Date: "),
    ],
)
def test_advice_about_a_template_that_auto_cannot_follow_is_advice_that_works(
    own: str, kind: str, nearest: str, lost: str
) -> None:
    tokenizer = tokenizer_with(own, kind)
    with pytest.raises(TemplateError) as caught:
        load_template("auto", tokenizer)
    said = str(caught.value)
    assert f"; {nearest} is the nearest to it, but leaves out " in said and lost in said
    assert said.endswith(f"; name {nearest}, or a jinja file of your own")
    note = unlike_own(nearest, load_template(nearest, tokenizer), tokenizer)
    assert note is not None and lost in note
    assert "auto cannot follow the model's own template; only a jinja file of your own can keep all of it." in note
    assert "auto keeps it" not in note
    other = unlike_own("vicuna_v1", load_template("vicuna_v1", tokenizer), tokenizer)
    assert other is not None and f"{nearest} is nearer to it" in other


def test_a_note_says_what_a_named_template_leaves_out_and_what_follows() -> None:
    tokenizer = model_tokenizer("qwen2.5")
    note = unlike_own("chatml", load_template("chatml", tokenizer), tokenizer)
    assert note == (
        "model.chat_template: chatml differs from the language model's own template, which also writes "
        r"'<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n'. "
        "Training and use both follow chatml, so nothing breaks, but the language model starts further from what it was "
        "trained on. chat_template: auto keeps it."
    )
    load_template("auto", tokenizer)  # as the note says
    assert unlike_own("auto", load_template("auto", tokenizer), tokenizer) is None
    tokenizer = model_tokenizer("qwen3 instruct")
    assert unlike_own("chatml", load_template("chatml", tokenizer), tokenizer) is None


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_content_is_a_text_or_a_list_of_parts_in_order(template: str) -> None:
    tokenizer = TOKENIZERS["llama3"]
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    jinja = load_template(template, tokenizer)
    for parts, as_text in [
        ([image, text], "<image>\nWhat?"),
        ([text, image], "What?\n<image>"),
        ([image, image, text, image], "<image>\n<image>\nWhat?\n<image>"),
        ([text, text], "What?What?"),
        ([image], "<image>"),
    ]:
        answer = [{"type": "text", "text": "A"}]
        system = {"role": "system", "content": [{"type": "text", "text": "S"}]}
        listed = [system, {"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        plain = [{"role": "system", "content": "S"}, {"role": "user", "content": as_text}]
        plain += [{"role": "assistant", "content": "A"}]
        assert rendered(tokenizer, jinja, listed, False) == rendered(tokenizer, jinja, plain, False)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_an_exported_template_marks_answers_for_plain_transformers(template: str) -> None:
    """Its mask, found by its own way from characters to tokens, is ours."""
    tokenizer = TOKENIZERS["bytes"]
    chat = ChatEncoder(tokenizer, load_template(template, tokenizer), 1, 1000)
    messages = [{**turn, "content": turn["content"].replace("<image>\n", "")} for turn in TURNS]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=chat.template, return_assistant_tokens_mask=True, return_dict=True
    )
    text, spans = chat.render(tuple(Turn(turn["role"], turn["content"]) for turn in messages))
    input_ids, labels = chat._tokenize(text, spans)
    assert input_ids.tolist() == theirs["input_ids"]
    assert (labels != -100).tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


ALPACA = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '### Response:\\n' -}}{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
    {%- else -%}
        {{- ('### Instruction:\\n' if message.role == 'user' else '') + message.content + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_jinja_file_of_the_user_is_taken_as_it_is(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "alpaca.jinja").write_text(ALPACA, encoding="utf-8")
    assert load_template(str(tmp_path / "alpaca.jinja"), TOKENIZERS[tokenizer]) == ALPACA


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_templates_of_ours_pass_as_files_of_the_user(template: str, tmp_path: Path) -> None:
    text = load_template(template, TOKENIZERS["llama3"])
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    assert load_template(str(tmp_path / "own.jinja"), TOKENIZERS["llama3"]) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("endfor", "endfour", "cannot render a conversation of system, user and assistant: TemplateSyntaxError: "),
        ("{%- else", "{%- elif message.role == 'system' -%}{{ raise_exception('no system') }}{%- else", "TemplateError: no system; it must"),
        ("message.content + eos_token", "message.content + 1", "cannot render a conversation of system, user and assistant: TypeError: "),
        ("{%- generation -%}", "", "cannot render a conversation of system, user and assistant: TemplateSyntaxError: "),
        ("{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}", "", "marks 0 answers of a conversation that has 3; write {% generation %} before"),
        ("message.role == 'assistant'", "message.role == 'assistant' and loop.last", "marks 1 answers of a conversation that has 3"),
        ("message.content + eos_token", "eos_token", "as generated where the answer is 'Yes, it is.'; write {% generation %} out"),
        (" + eos_token -}}{%- endgeneration -%}", " -}}{%- endgeneration -%}{{- eos_token -}}", "marks no end of an answer as generated; write"),
        ("'') + message.content", "'') + message.content.replace('<image>', '')", "writes 0 <image> for 2; write the content"),
        ("prompt -%}{{- '### Response:\\n'", "prompt -%}{{- '### Response: '", "?\\n### Response: ', but has "),
        ("{%- if add_generation_prompt", "{%- if false", "write with add_generation_prompt just what stands before {% generation %}"),
    ],
)  # fmt: skip
def test_a_broken_jinja_file_is_refused_with_what_is_wrong(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jinja"
    assert old in ALPACA
    path.write_text(ALPACA.replace(old, new), encoding="utf-8")
    with pytest.raises(TemplateError) as caught:
        load_template(str(path), TOKENIZERS["bytes"])
    assert str(caught.value).startswith(f"model.chat_template: {path} ")
    assert message in str(caught.value)


def test_a_jinja_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="cannot read .*: .*No such file"):
        load_template(str(tmp_path / "none.jinja"), TOKENIZERS["bytes"])
    (tmp_path / "latin.jinja").write_bytes(b"\xfc")
    with pytest.raises(TemplateError, match="cannot read .*: 'utf-8' codec"):
        load_template(str(tmp_path / "latin.jinja"), TOKENIZERS["bytes"])


@pytest.mark.skipif("smollm2" not in TOKENIZERS, reason="needs parts/smollm2-135m-instruct")
def test_a_template_whose_prompts_the_tokenizer_joins_to_answers_is_refused() -> None:
    """GPT-2's pattern makes one piece of two new lines at the end of a text, and two before a word."""
    with pytest.raises(
        TemplateError, match=r"llama3 does not fit the tokenizer .* which joins '.*\\n\\n' to the answer"
    ):
        load_template("llama3", TOKENIZERS["smollm2"])


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        ("vicuna_v1", "an end-of-sequence token"),
        ("llava_v0", "an end-of-sequence token"),
        ("llama2", "an end-of-sequence token"),
        ("llama3", "<|start_header_id|>, <|end_header_id|>, <|eot_id|>"),
        ("mistral", "an end-of-sequence token"),
        ("mistral_v3", "an end-of-sequence token"),
        ("chatml", "<|im_start|>, <|im_end|>"),
        ("phi3", "<|system|>, <|user|>, <|assistant|>, <|end|>, an end-of-sequence token"),
        ("gemma", "<start_of_turn>, <end_of_turn>"),
        ("zephyr", "an end-of-sequence token"),
    ],
)
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(template: str, missing: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(TemplateError) as caught:
        load_template(template, tokenizer)
    assert str(caught.value) == (
        f"model.chat_template: {template} needs {missing}, which the tokenizer of the language model lacks; choose the "
        "template that the language model was trained with"
    )
