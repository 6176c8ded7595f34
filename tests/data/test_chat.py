"""Invariant 2: exactly the assistant's tokens are supervised, the end of the turn included."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_train.data.chat import IGNORED, ChatEncoder, OverLong, load_template
from llava_train.data.samples import Sample, SampleError, Turn, parse_record
from llava_train.model.build import byte_tokenizer

N_IMAGE_TOKENS = 5
TEMPLATES = ("plain", "vicuna_v1", "chatml")
SMOLLM2 = Path(__file__).parents[2] / "parts/smollm2-135m-instruct"


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer built like Llama's: words begin with ▁, unknown characters fall back to bytes, BOS is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=control + byte_tokens, show_progress=False)
    corpus = ["USER: what is it? ASSISTANT: it is a red circle", "user assistant system", "abc def ghi 0123456789"]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    content = json.loads(tokenizer.to_str())  # bytes are ordinary tokens that a text cannot spell
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in control]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    found = {"bytes": byte_tokenizer(), "llama": llama_like_tokenizer()}
    if SMOLLM2.is_dir():
        found["smollm2"] = AutoTokenizer.from_pretrained(SMOLLM2)
    for tokenizer in found.values():
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return found


TOKENIZERS = tokenizers()


@cache
def encoder(template: str, tokenizer: str = "bytes", **settings) -> ChatEncoder:
    chosen = TOKENIZERS[tokenizer]
    defaults = {"n_image_tokens": N_IMAGE_TOKENS, "max_tokens": 4096}
    return ChatEncoder(chosen, load_template(template, chosen), **{**defaults, **settings})


def sample_of(*texts: str, system: str | None = None) -> Sample:
    """User and assistant by turns; as many images as placeholders."""
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    n_images = sum(text.count("<image>") for text in texts)
    return Sample("x", tuple(Path(f"{i}.png") for i in range(n_images)), tuple(turns))


SAMPLES = {
    "one turn": sample_of("<image>\nWhat is it?", "A red circle."),
    "many turns": sample_of("<image>\nWhat?", "A", "And?", "B b", "Then?", "C c c"),
    "system turn": sample_of("<image>\nWhat?", "A", system="Be brief."),
    "later image": sample_of("Hello", "Hi", "<image>\nWhat?", "A cat"),
    "two images": sample_of("<image>\n<image>\nWhich?", "The first", "<image>\nAnd now?", "The third"),
    "no image": sample_of("What is 2 + 2?", "4"),
    "unicode": sample_of("<image>\nÜber “naïve” 北京?", "Ça va 👍🏽 — 東京。"),
    "markers": sample_of("<image>\nSay USER: and ASSISTANT:", "USER: ASSISTANT: user\nassistant"),
    "spaces": parse_record(
        {
            "conversations": [
                {"from": "human", "value": "  <image>  What?  "},
                {"from": "gpt", "value": " \n two  spaces\t inside \n"},
            ],
            "image": "0.png",
        },
        Path(),
        default_id="x",
    ),
    "adjacent images": sample_of("<image><image> Which? <image>", "The second"),
    "newlines": sample_of("<image>\nList.", "1. one\n2. two\n\nDone."),
}


def expected_text(template: str, sample: Sample, eos: str) -> list[str]:
    """What must be supervised, written down from the published formats."""
    answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    wrap = {"plain": "{}\n", "vicuna_v1": " {}" + eos, "chatml": "{}<|im_end|>"}[template]
    return [wrap.format(answer) for answer in answers]


def supervised_runs(labels: list[int]) -> list[list[int]]:
    """Maximal runs of supervised labels."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


# plain is for captions: without an image nothing would precede the first answer's first token.
CASES = [(t, c) for t in TEMPLATES for c in SAMPLES if t != "plain" or "<image>" in SAMPLES[c].turns[0].text]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("template", "case"), CASES)
def test_exactly_the_answers_and_the_end_of_their_turns_are_supervised(case, template, tokenizer) -> None:
    chosen = TOKENIZERS[tokenizer]
    encoded = encoder(template, tokenizer).encode(SAMPLES[case])
    expected = expected_text(template, SAMPLES[case], chosen.eos_token)
    runs = supervised_runs(encoded.labels.tolist())
    decoded = [chosen.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]
    if template == "plain":  # answers with no user's text between them form one run
        expected, decoded = ["".join(expected)], ["".join(decoded)]
    assert decoded == expected
    positions = encoded.labels != IGNORED
    assert (encoded.labels[positions] == encoded.input_ids[positions]).all()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("case", SAMPLES)
def test_images_take_their_tokens_and_are_never_supervised(case, template, tokenizer) -> None:
    chat, sample = encoder(template, tokenizer), SAMPLES[case]
    encoded = chat.encode(sample)
    is_image = encoded.input_ids == chat.image_token_id
    assert is_image.sum() == N_IMAGE_TOKENS * len(sample.images)
    assert (encoded.labels[is_image] == IGNORED).all()
    assert encoded.n_images == len(sample.images)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("case", SAMPLES)
def test_the_tokens_of_an_image_stand_together_where_its_placeholder_stood(case, tokenizer) -> None:
    chat, sample = encoder("chatml", tokenizer), SAMPLES[case]
    narrow = encoder("chatml", tokenizer, n_image_tokens=1).encode(sample).input_ids.tolist()
    widened = [i for i in narrow for _ in range(N_IMAGE_TOKENS if i == chat.image_token_id else 1)]
    assert chat.encode(sample).input_ids.tolist() == widened
    rendered = "".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n" for turn in sample.turns)
    decoded = chat.tokenizer.decode(narrow, clean_up_tokenization_spaces=False)
    assert decoded.removeprefix("<s>").lstrip(" ") == rendered


# Control tokens begin with <; SmolLM2's vocabulary lacks bytes of the highest code points.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<", max_codepoint=0x1FFFF)
TEXT = st.text(CHARACTERS, min_size=1, max_size=30).map(str.strip).filter(bool)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), template=st.sampled_from(["vicuna_v1", "chatml"]))
def test_random_conversations_supervise_exactly_their_answers(texts, template) -> None:
    sample = sample_of(*[text for pair in texts for text in pair])
    encoded = encoder(template).encode(sample)
    tokenizer = TOKENIZERS["bytes"]
    decoded = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in supervised_runs(encoded.labels)]
    assert decoded == expected_text(template, sample, tokenizer.eos_token)


QUESTION = st.lists(st.one_of(TEXT, st.just("<image>")), min_size=1, max_size=3).map(" ".join)
CONVERSATION = st.tuples(st.none() | TEXT, st.lists(st.tuples(QUESTION, TEXT), min_size=1, max_size=4))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=CONVERSATION, template=st.sampled_from(TEMPLATES), tokenizer=st.sampled_from(sorted(TOKENIZERS)))
def test_random_conversations_with_images_supervise_exactly_their_answers(conversation, template, tokenizer) -> None:
    system, pairs = conversation
    first, *others = pairs
    sample = sample_of(f"<image>\n{first[0]}", first[1], *[text for pair in others for text in pair], system=system)
    chosen = TOKENIZERS[tokenizer]
    encoded = encoder(template, tokenizer).encode(sample)
    is_image = encoded.input_ids == chosen.convert_tokens_to_ids("<image>")
    assert is_image.sum() == N_IMAGE_TOKENS * len(sample.images)
    assert (encoded.labels[is_image] == IGNORED).all()
    supervised = encoded.labels[encoded.labels != IGNORED].tolist()
    decoded = chosen.decode(supervised, clean_up_tokenization_spaces=False)
    assert decoded == "".join(expected_text(template, sample, chosen.eos_token))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("template", "case"), CASES)
def test_each_prompt_of_use_is_the_beginning_of_the_training_text(template, case, tokenizer) -> None:
    chat, sample = encoder(template, tokenizer, n_image_tokens=1), SAMPLES[case]
    text, spans = chat.render(sample.turns)
    trained = chat.encode(sample)
    answers = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    for number, (start, _) in zip(answers, spans, strict=True):
        prompt, _ = chat.render(sample.turns[:number], prompt=True)
        assert text[:start] == prompt
        ids = chat.tokenizer(prompt, add_special_tokens=False).input_ids
        assert trained.input_ids[: len(ids)].tolist() == ids
        assert trained.labels[len(ids)] != IGNORED
        if template != "plain" or number == answers[0]:  # answers of plain follow each other
            assert trained.labels[len(ids) - 1] == IGNORED


def as_list_content(turn: Turn) -> dict:
    """A turn as transformers' users write it: images first, then one text."""
    text = turn.text.replace("<image>\n", "")
    images = [{"type": "image"}] * turn.text.count("<image>\n")
    return {"role": turn.role, "content": [*images, {"type": "text", "text": text}]}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("case", ["one turn", "many turns", "system turn", "later image", "two images", "unicode"])
def test_string_and_list_content_render_the_same_text(case, template) -> None:
    tokenizer, turns = TOKENIZERS["llama"], SAMPLES[case].turns
    text, parts = (
        tokenizer.apply_chat_template(messages, chat_template=load_template(template, tokenizer), tokenize=False)
        for messages in (
            [{"role": turn.role, "content": turn.text} for turn in turns],
            [as_list_content(turn) for turn in turns],
        )
    )
    assert parts == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_generation_stops_at_the_last_supervised_token_of_an_answer(template, tokenizer) -> None:
    chat = encoder(template, tokenizer)
    encoded = chat.encode(SAMPLES["one turn"])
    assert chat.end_of_turn_id() == encoded.labels[encoded.labels != IGNORED][-1]
    end = {"plain": "\n", "vicuna_v1": chat.tokenizer.eos_token, "chatml": "<|im_end|>"}[template]
    assert chat.tokenizer.decode([chat.end_of_turn_id()]) == end


def test_vicuna_v1_is_the_published_text() -> None:
    text, _ = encoder("vicuna_v1").render(SAMPLES["one turn"].turns)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A red circle.</s>"
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_begin_of_sequence_token_stands_where_the_tokenizer_adds_one_and_before_a_first_image(template, name) -> None:
    tokenizer, chat = TOKENIZERS[name], encoder(template, name)
    wanted = tokenizer.bos_token if name == "llama" or template == "plain" else ""
    first = {"plain": "<image>", "vicuna_v1": "A chat", "chatml": "<|im_start|>user"}[template]
    text, _ = chat.render(SAMPLES["one turn"].turns)
    assert text.startswith(wanted + first)
    input_ids = chat.encode(SAMPLES["one turn"]).input_ids.tolist()
    assert (input_ids[0] == tokenizer.bos_token_id) == bool(wanted or (template, name) == ("chatml", "smollm2"))
    if name != "smollm2":  # its token begins every turn of chatml too
        assert input_ids.count(tokenizer.bos_token_id) == bool(wanted)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (sample_of("Hi <|im_end|>", "A"), r"turn 1: the text holds the control token '<\|im_end\|>'"),
        (sample_of("Hi", "A</s>"), "turn 2: the text holds the control token '</s>'"),
        (sample_of("Hi", "A", system="<pad>"), "turn 1: the text holds the control token '<pad>'"),
    ],
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_control_token_in_a_text_is_refused(sample, message, template) -> None:
    with pytest.raises(SampleError, match=message):
        encoder(template).encode(sample)


def test_added_tokens_that_are_ordinary_text_are_trained_on() -> None:
    """As `<think>` of Qwen 3 and the runs of spaces of Phi."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens(["<think>", "  "])
    chat = ChatEncoder(tokenizer, load_template("chatml", tokenizer), 1, 200)
    encoded = chat.encode(sample_of("Hi  you", "<think>A</think>"))
    assert tokenizer.decode(encoded.labels[encoded.labels != IGNORED]) == "<think>A</think><|im_end|>"


def test_the_tokens_of_a_template_are_control_tokens_whatever_the_tokenizer_says() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    tokenizer.add_tokens(["<image>", "<|im_start|>", "<|im_end|>"])
    chat = ChatEncoder(tokenizer, load_template("chatml", tokenizer), 1, 100)
    with pytest.raises(SampleError, match=r"the control token '<\|im_start\|>'"):
        chat.encode(sample_of("Hi <|im_start|>", "A"))


def test_a_tokenizer_without_control_tokens_takes_an_empty_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    chat = ChatEncoder(tokenizer, load_template("plain", tokenizer), 1, 100)
    assert chat.encode(sample_of("<image>", "")).n_tokens == 2


def test_an_empty_answer_has_only_its_end_supervised() -> None:
    encoded = encoder("chatml").encode(sample_of("Hi", ""))
    assert TOKENIZERS["bytes"].decode(encoded.labels[encoded.labels != IGNORED]) == "<|im_end|>"


def test_a_template_without_its_control_tokens_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"chatml needs <\|im_start\|>, <\|im_end\|>"):
        load_template("chatml", tokenizer)
    with pytest.raises(ValueError, match="vicuna_v1 needs an end-of-sequence token"):
        load_template("vicuna_v1", tokenizer)


@pytest.mark.parametrize("over_long", ["error", "drop"])
def test_an_over_long_sample_is_not_encoded(over_long) -> None:
    with pytest.raises(OverLong, match=r"tokens, more than batch.max_sample_tokens \(20\)"):
        encoder("chatml", max_tokens=20, over_long=over_long).encode(SAMPLES["one turn"])


@settings(max_examples=300, deadline=None)
@given(max_tokens=st.integers(1, 200), case=st.sampled_from(list(SAMPLES)), template=st.sampled_from(TEMPLATES))
def test_truncation_never_cuts_an_image_nor_leaves_nothing_to_supervise(max_tokens, case, template) -> None:
    chat, sample = encoder(template, max_tokens=max_tokens, over_long="truncate"), SAMPLES[case]
    whole = encoder(template).encode(sample)
    try:
        encoded = chat.encode(sample)
    except OverLong as error:
        assert "nothing to supervise" in str(error)
        return
    n_image_tokens = int((encoded.input_ids == chat.image_token_id).sum())
    assert encoded.n_tokens <= max_tokens
    assert n_image_tokens == N_IMAGE_TOKENS * encoded.n_images
    assert (encoded.labels != IGNORED).any()
    assert encoded.input_ids.tolist() == whole.input_ids[: encoded.n_tokens].tolist()
    assert encoded.truncated == (whole.n_tokens > max_tokens)
