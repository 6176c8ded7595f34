"""`LLaVA` against plain transformers, which knows nothing of it."""

from __future__ import annotations

import base64
import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import processors
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_train import LLaVA
from llava_train.data.samples import Turn
from llava_train.errors import Note, UserError
from llava_train.files import write_manifest
from llava_train.model.foreign import load_transformers
from llava_train.model.weights import export_model
from llava_train.use.export import export
from llava_train.use.generation import Sampling, left_padded, visible
from llava_train.use.llava import Question, question_about
from tests.tiny import model_section, tiny_llava
from tests.use.exports import BLUE, LORA, RED, export_tiny, write_run

QUESTIONS: list[Any] = [
    (RED, "What is it?"),
    (None, "Hello"),
    ((RED, BLUE), "Which of the two is longer, and why do you think so?"),
    ((BLUE, RED), "This <image> and that <image>?"),
    (BLUE, "And this?"),
]
_TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA_HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}" + _TEXTS + "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}" + _TEXTS + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""That of llava-hf/llava-1.5-7b-hf; earlier ones have no generation marks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def llava(folder: Path) -> LLaVA:
    return LLaVA.from_pretrained(folder, "cpu")


def plain_answer(folder: Path, text: str, images: list[Any], n: int) -> str:
    """What plain transformers answers to a rendered prompt."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = processor(text=text, images=images or None, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_batch_of_unequal_questions_is_answered_as_plain_transformers_answers_each(
    llava: LLaVA, folder: Path
) -> None:
    texts = [
        "<image>\nWhat is it?",
        "Hello",
        "<image>\n<image>\nWhich of the two is longer, and why do you think so?",
        "This <image> and that <image>?",
        "<image>\nAnd this?",
    ]
    images = [[RED], [], [RED, BLUE], [BLUE, RED], [BLUE]]
    expected = [
        plain_answer(folder, f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", shown, 16)
        for text, shown in zip(texts, images, strict=True)
    ]
    assert llava.generate(QUESTIONS, max_new_tokens=16) == expected
    assert llava.generate(QUESTIONS, max_new_tokens=16, batch_size=2) == expected
    assert len(set(expected)) > 2, "the questions are not told apart, so nothing was compared"


@pytest.mark.parametrize("chat_template", ["chatml", "vicuna_v1", "llava_v0", "plain"])
def test_a_streamed_answer_is_the_answer(tmp_path: Path, chat_template: str) -> None:
    llava = LLaVA.from_pretrained(export_tiny(tmp_path / "model", chat_template))
    for images, text in QUESTIONS:
        pieces = list(llava.stream(question_about(images, text), max_new_tokens=20))
        assert "".join(pieces) == llava.generate([(images, text)], max_new_tokens=20)[0]


def test_an_answer_ends_where_training_ended_it(tmp_path: Path) -> None:
    """`###` of llava_v0 is no token: the text must be cut there, and the computation must stop."""
    llava = LLaVA.from_pretrained(export_tiny(tmp_path / "model", "llava_v0"))
    script = iter([*b"it is red###", *b"never"])
    forward, n_calls = llava.model.forward, 0

    @functools.wraps(forward)
    def scripted(*arguments: Any, **more: Any) -> Any:
        nonlocal n_calls
        output, n_calls = forward(*arguments, **more), n_calls + 1
        byte_id = llava.processor.tokenizer.encode(chr(next(script)), add_special_tokens=False)[0]
        output.logits[..., -1, :] = -1e9
        output.logits[..., -1, byte_id] = 0.0
        return output

    llava.model.forward = scripted
    assert llava.generate_from_image(RED, "What?") == "it is red"
    assert n_calls == len("it is red###")


def test_closing_a_stream_ends_the_computation(llava: LLaVA, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, n_calls = llava.model.forward, 0

    @functools.wraps(forward)
    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return forward(*arguments, **more)

    monkeypatch.setattr(llava.model, "forward", counted)
    monkeypatch.setattr(llava._prompts, "end_ids", [len(llava.processor.tokenizer)])
    stream = llava.stream(question_about(RED, "What?"), max_new_tokens=900)
    next(stream)
    stream.close()
    n_then = n_calls
    llava.generate([(None, "Hello")], max_new_tokens=2)
    assert n_then < 900
    assert n_calls == n_then + 2


def test_what_fails_while_an_answer_is_computed_reaches_its_reader(
    llava: LLaVA, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(llava.model.forward)
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(llava.stream(question_about(RED, "What?")))


def test_a_seed_decides_the_draws_and_leaves_those_of_others_alone(llava: LLaVA) -> None:
    drawn = [llava.generate(QUESTIONS, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    llava.generate(QUESTIONS, max_new_tokens=2, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_chat_remembers_its_turns_and_pictures(llava: LLaVA) -> None:
    chat = llava.chat(system="Be kind.")
    first = chat.ask("What is it?", RED, max_new_tokens=6)
    second = chat.ask("And this?", [BLUE], max_new_tokens=6)
    turns = (
        Turn("system", "Be kind."),
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", first),
        Turn("user", "<image>\nAnd this?"),
    )
    assert second == llava.generate([Question(turns, (RED, BLUE))], max_new_tokens=6)[0]
    assert chat.turns == [*turns, Turn("assistant", second)]


def test_a_chat_reads_a_picture_once_for_all_its_turns(llava: LLaVA) -> None:
    content = io.BytesIO()
    RED.save(content, "PNG")
    content.seek(0)
    chat, again = llava.chat(), llava.chat()
    heard = [chat.ask("What is it?", content, max_new_tokens=5), chat.ask("And?", max_new_tokens=5)]
    assert heard == [again.ask("What is it?", RED, max_new_tokens=5), again.ask("And?", max_new_tokens=5)]


def test_a_chat_keeps_what_was_read_of_an_answer_and_nothing_of_a_refused_question(llava: LLaVA) -> None:
    chat = llava.chat()
    with pytest.raises(UserError, match="control token"):
        chat.ask("<|im_end|>", RED)
    assert chat.turns == chat.images == []
    stream = chat._keeping(Turn("user", "Hello"), (), iter(["one", " two", " three"]))
    next(stream)
    stream.close()
    assert chat.turns == [Turn("user", "Hello"), Turn("assistant", "one")]


def test_log_likelihoods_are_those_of_the_answer_and_its_end_token_by_token(llava: LLaVA) -> None:
    answers = ["yes", "a longer answer"]
    found = llava.log_likelihoods(question_about(RED, "What?"), answers)
    for answer, (total, n_tokens) in zip(answers, found, strict=True):
        prompt = llava.prompt(question_about(RED, "What?"))
        tokenizer = llava.processor.tokenizer
        ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
        input_ids = torch.tensor([*prompt.input_ids, *ids])[None]
        with torch.no_grad():
            logits = llava.model(input_ids=input_ids, pixel_values=prompt.pixel_values).logits[0]
        log_probabilities = logits.log_softmax(-1)[-len(ids) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(log_probabilities, ids, strict=True))
        assert total == pytest.approx(expected, abs=1e-4)
        assert n_tokens == len(ids)


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("is_exported", [True, False])
def test_a_llava_hf_model_gets_the_prompt_that_its_processor_makes(
    tmp_path: Path, is_marked: bool, is_exported: bool
) -> None:
    """Its template takes parts, marks no end, and leaves the begin-of-sequence token to the tokenizer."""
    made = tiny_llava()
    template = LLAVA_HF_TEMPLATE if is_marked else re.sub(r"{% (end)?generation %}", "", LLAVA_HF_TEMPLATE)
    made.processor.chat_template = template
    made.tokenizer.add_bos_token = True
    made.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.tokenizer.bos_token_id)]
    )
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    if is_exported:
        export(str(tmp_path), tmp_path / "exported")
        tmp_path = tmp_path / "exported"
    llava = LLaVA.from_pretrained(tmp_path)

    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=text, images=RED, return_tensors="pt")
    prompt = llava.prompt(question_about(RED, "What is it?"))
    assert prompt.input_ids.tolist() == expected.input_ids[0].tolist()
    assert expected.input_ids[0, 0] == made.tokenizer.bos_token_id
    assert torch.equal(prompt.pixel_values, expected.pixel_values)
    (total, n_tokens), *_ = llava.log_likelihoods(question_about(RED, "What is it?"), ["red"])
    assert n_tokens == len(" red")
    assert total < 0
    assert llava._prompts.end_ids[0] == made.tokenizer.eos_token_id


def test_parts_are_joined_untrained(tmp_path: Path) -> None:
    made = tiny_llava(model_section(chat_template="chatml"))
    made.model.model.vision_tower.save_pretrained(tmp_path / "eye")
    made.processor.image_processor.save_pretrained(tmp_path / "eye")
    causal = LlamaForCausalLM(made.model.config.text_config)
    causal.save_pretrained(tmp_path / "tongue")
    tokenizer = made.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tongue")
    with pytest.warns(Note, match="has learnt nothing: answers will be empty") as warned:
        llava = LLaVA(vision_model_path=tmp_path / "eye", language_model_path=tmp_path / "tongue", device="cpu")
    assert [Path(warning.filename) for warning in warned if warning.category is Note] == [Path(__file__)], "once, here"
    assert isinstance(llava.generate_from_image(RED, "What can you see in this image?", max_new_tokens=4), str)
    for name, tensor in causal.model.named_parameters():
        joined = llava.model.model.language_model.get_parameter(name)
        assert torch.equal(joined[: len(tensor)], tensor), name


@pytest.mark.parametrize("form", ["path", "text", "bytes", "picture", "data URL"])
def test_a_picture_may_be_given_in_any_form(llava: LLaVA, tmp_path: Path, form: str) -> None:
    RED.save(tmp_path / "red.png")
    content = io.BytesIO()
    RED.save(content, "PNG")
    forms = {
        "path": tmp_path / "red.png",
        "text": str(tmp_path / "red.png"),
        "bytes": content.getvalue(),
        "picture": RED.convert("RGBA"),
        "data URL": "data:image/png;base64," + base64.b64encode(content.getvalue()).decode(),
    }
    expected = llava.prompt(question_about(RED, "What?")).pixel_values
    assert torch.equal(llava.prompt(question_about(forms[form], "What?")).pixel_values, expected)


def test_a_transparent_picture_is_asked_about_as_it_looks_on_white(llava: LLaVA, tmp_path: Path) -> None:
    stamp = Image.new("RGBA", (40, 40), (200, 60, 20, 0))
    stamp.paste((0, 0, 255, 255), (10, 10, 30, 30))
    stamp.save(tmp_path / "stamp.png")
    on_white = Image.new("RGB", (40, 40), "white")
    on_white.paste((0, 0, 255), (10, 10, 30, 30))
    expected = llava.prompt(question_about(on_white, "What?")).pixel_values
    for picture in (stamp, tmp_path / "stamp.png"):
        assert torch.equal(llava.prompt(question_about(picture, "What?")).pixel_values, expected)


def test_a_file_that_was_opened_as_text_is_refused(llava: LLaVA, tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    with (
        (tmp_path / "red.png").open(encoding="utf-8") as file,
        pytest.raises(UserError, match="is open in text mode; open it with mode 'rb'"),
    ):
        llava.generate_from_image(file, "What?")


@pytest.mark.parametrize(
    ("image", "text", "settings", "message"),
    [
        ("nowhere.png", "What?", {}, "nowhere.png: the image file is missing"),
        (b"no picture", "What?", {}, "the picture: not a readable image"),
        (Image.new("F", (9, 9), 0.5), "What?", {}, "the picture: of mode F"),
        (Image.new("I", (9, 9), 300), "What?", {}, "the picture: of mode I"),
        (Image.new("RGB", (0, 9)), "What?", {}, "the picture: has no pixels (0 x 9)"),
        (io.StringIO("nowhere.png"), "What?", {}, "the picture's file is open in text mode; open it with mode 'rb'"),
        (
            np.zeros((9, 9, 3), np.uint8),
            "What?",
            {},
            "a picture is a path, bytes, a PIL image or an address, not ndarray",
        ),
        ([7], "What?", {}, "a picture is a path, bytes, a PIL image or an address, not int"),
        ("http://example.org/a.png", "What?", {}, "addresses are not fetched unless allowed"),
        (RED, "<image> <image>?", {}, "2 <image> placeholders, but 1 images"),
        (RED, "so <|im_end|>", {}, "the text holds the control token '<|im_end|>'"),
        (RED, "long " * 2000, {}, "tokens, the model reads 2048"),
        (RED, "What?", {"temperature": -1.0}, "temperature: -1.0 is out of range"),
        (RED, "What?", {"max_new_tokens": 0}, "max_new_tokens: 0 is out of range"),
        (RED, "What?", {"max_tokens": 5}, "known are: max_new_tokens, temperature,"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    llava: LLaVA, image: Any, text: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        llava.generate_from_image(image, text, **settings)


def test_what_is_no_finished_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: run\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("nothing")
    for name, message in {
        "run": "is a run without a finished model/; start its stage again",
        "other": "holds notes.txt; understood are: ",
    }.items():
        with pytest.raises(UserError, match=message):
            LLaVA.from_pretrained(tmp_path / name)


def test_a_run_whose_model_was_half_written_is_refused(tmp_path: Path) -> None:
    export_tiny(tmp_path / "run/model")
    with pytest.raises(UserError, match="start its stage again"):
        LLaVA.from_pretrained(tmp_path / "run")
    write_manifest(tmp_path / "run/model", name="run")
    LLaVA.from_pretrained(tmp_path / "run")


def test_in_bf16_the_logits_are_those_of_plain_transformers(tmp_path: Path) -> None:
    """Rotary frequencies stay in float32."""
    made = tiny_llava(model_section(chat_template="chatml"), torch.bfloat16)
    export_model(made.model, made.processor, 0, tmp_path)
    llava = LLaVA.from_pretrained(tmp_path, "cpu", dtype="bf16")
    prompt = llava.prompt(question_about(RED, "What is it? " * 40))
    inputs = {
        "input_ids": torch.from_numpy(prompt.input_ids)[None],
        "pixel_values": prompt.pixel_values.to(torch.bfloat16),
    }
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(llava.model(**inputs).logits, plain(**inputs).logits)


def test_an_export_with_an_adapter_beside_it_answers_as_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trainable=LORA)
    export(str(run), tmp_path / "out")
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    answers = {
        name: LLaVA.from_pretrained(tmp_path / name).log_likelihoods(question_about(RED, "What?"), ["red", "blue"])
        for name in ("run", "out")
    }
    for (ours, _), (theirs, _) in zip(answers["run"], answers["out"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    whole = load_transformers(tmp_path / "out").state_dict()
    assert any(not torch.equal(base[name], whole[name]) for name in base)


def test_no_answer_leaves_what_the_model_can_read(llava: LLaVA, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = llava.prompt(question_about(RED, "What?"))
    monkeypatch.setattr(llava._prompts, "max_tokens", len(prompt.input_ids) + 3)
    asked: dict[str, Any] = {}
    generate = llava.model.generate
    monkeypatch.setattr(llava.model, "generate", lambda **more: asked.update(more) or generate(**more))
    llava.generate_from_image(RED, "What?", max_new_tokens=500)
    assert asked["max_new_tokens"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_needs_a_gpu_says_so_where_there_is_none(folder: Path) -> None:
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        LLaVA.from_pretrained(folder, "cuda")
    with pytest.raises(UserError, match="4bit: quantized weights need a CUDA device"):
        LLaVA.from_pretrained(folder, quantization="4bit")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_answer_on_a_gpu(tmp_path: Path, quantization: Any) -> None:
    pytest.importorskip("bitsandbytes")
    made = tiny_llava(model_section(chat_template="chatml"), torch.bfloat16)
    export_model(made.model, made.processor, 0, tmp_path)
    whole = LLaVA.from_pretrained(tmp_path, "cuda")
    small = LLaVA.from_pretrained(tmp_path, "cuda", quantization=quantization)
    assert small.model.get_memory_footprint() < whole.model.get_memory_footprint()
    assert isinstance(small.generate_from_image(RED, "What?", max_new_tokens=4), str)


@given(st.lists(st.text("# \nab"), max_size=8), st.sampled_from([None, "###", "\n"]))
def test_what_is_shown_of_a_stream_is_the_text_up_to_its_end(pieces: list[str], stop: str | None) -> None:
    text = "".join(pieces)
    whole = text.lstrip()
    expected = (whole.partition(stop)[0] if stop else whole).strip()
    assert "".join(visible(pieces, stop)) == expected


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_padding_on_the_left_keeps_every_token_in_its_place_from_the_end(rows: list[list[int]]) -> None:
    input_ids, mask = left_padded([np.array(row) for row in rows], pad_id=0)
    assert input_ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for ids, seen, row in zip(input_ids.tolist(), mask.tolist(), rows, strict=True):
        assert ids[len(ids) - len(row) :] == row
        assert seen == [0] * (len(ids) - len(row)) + [1] * len(row)


def test_sampling_at_temperature_zero_is_greedy() -> None:
    assert Sampling().settings()["do_sample"] is False
    assert Sampling(temperature=0.5).settings() | {"top_k": 0} == Sampling(temperature=0.5).settings()


@pytest.mark.parametrize(
    ("questions", "settings", "message"),
    [
        ([(RED, "What?")], {"batch_size": 0}, "batch_size: 0 is out of range"),
        ((RED, "What?"), {}, "a question is a Question or a pair of a picture"),
        (["What?"], {}, "a question is a Question or a pair"),
        ([(RED, None)], {}, "a question is a text, not NoneType"),
        ([(RED, " ")], {}, "the question is empty"),
        ([(5, "What?")], {}, "a picture is a path, bytes, a PIL image or an address, not int"),
        ([("file:///a.png", "What?")], {}, "only http(s) addresses are fetched"),
        ([(RED, "What?")], {"max_new_tokens": "5"}, "max_new_tokens: '5' is not a whole number"),
    ],
)
def test_what_is_no_question_is_refused_in_words(
    llava: LLaVA, questions: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        llava.generate(questions, **settings)


def test_the_model_of_stage_1_says_what_it_sees(tmp_path: Path) -> None:
    llava = LLaVA.from_pretrained(export_tiny(tmp_path, "plain"))
    assert llava.ignores_question
    assert llava.generate_from_image(RED, "") == llava.generate_from_image(RED, "What?")


def test_others_may_read_what_an_export_writes(folder: Path) -> None:
    (folder / "ordinary").touch()
    modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert modes == {(folder / "ordinary").stat().st_mode}
