"""Invariant 2: exactly the assistant's tokens are supervised, the end of the turn included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from llava_train.config import CHAT_TEMPLATES
from llava_train.data.chat import IGNORED, ChatEncoder, OverLong
from llava_train.data.chat_templates import load_template
from llava_train.data.formats import parse_record
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.data.problems import SampleError
from llava_train.data.samples import Sample, Turn
from llava_train.model.processor import byte_tokenizer
from tests.data.chat_tokenizers import ADD_BOS, CONTROL_TOKENS, TOKENIZERS, add_control_tokens

N_IMAGE_TOKENS = 5
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_V0 = VICUNA.replace("user", "human")
# The pieces that GPT-2's pattern cuts a text into differ between the end of a prompt and the middle of a text.
PAIRS = [(t, n) for t in CHAT_TEMPLATES for n in TOKENIZERS if (t, n) != ("llama3", "smollm2")]


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
    "more markers": sample_of(
        "[INST] <<SYS>> ### Human: <image>", "[/INST] model\n ###Human: a ### Assistant: b #", "<</SYS>>", "## <|eot_id"
    ),
    "spaces": parse_record(
        {
            "conversations": [
                {"from": "human", "value": "  <image>  What?  "},
                {"from": "gpt", "value": " \n two  spaces\t inside \n"},
            ],
            "image": "0.png",
        },
        Pictures(PictureFolder(Path())),
        default_id="x",
    ),
    "three-image turn": sample_of("<image>\n<image>\n<image>\nWhich?", "None", "Sure?", "Yes"),
    "empty answer": sample_of("<image>\nWhat?", "", "And?", "B", "Then?", ""),
    "system turn, many turns": sample_of("What?", "A", "<image>\nAnd?", "B", system="Be\n\nbrief."),
    "adjacent images": sample_of("<image><image> Which? <image>", "The second"),
    "newlines": sample_of("<image>\nList.", "1. one\n2. two\n\nDone."),
}


def expected_pieces(template: str, sample: Sample, bos: str, eos: str) -> Iterator[tuple[str, bool]]:
    """The training text in pieces, and whether each is supervised, written down from the published formats."""
    system = sample.turns[0].text if sample.turns[0].role == "system" else None
    turns = sample.turns[system is not None :]
    yield bos, False
    if template in ("vicuna_v1", "llava_v0"):
        yield f"{system or VICUNA} " if template == "vicuna_v1" else f"{system or LLAVA_V0}###", False
    elif system is not None and template in ("chatml", "llama3", "phi3", "zephyr"):
        yield (
            {
                "chatml": f"<|im_start|>system\n{system}<|im_end|>\n",
                "llama3": f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
                "phi3": f"<|system|>\n{system}<|end|>\n",
                "zephyr": f"<|system|>\n{system}{eos}\n",
            }[template],
            False,
        )
    for number, (user, assistant) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        first = number == 0
        yield from expected_turn(
            template, user.text, assistant.text, system if first else None, "" if first else bos, eos
        )
    yield eos if template == "phi3" else "", False


def expected_turn(template: str, q: str, a: str, system: str | None, bos: str, eos: str) -> list[tuple[str, bool]]:
    """A question and its answer. `system` and `bos` are what formats put into the turn itself."""
    s = "" if system is None else f"{system}\n\n"
    llama2 = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
    before, answer, after = {
        "plain": ("<image>" * q.count("<image>"), f"{a}\n", ""),
        "vicuna_v1": (f"USER: {q} ASSISTANT:", f" {a}{eos}", ""),
        "llava_v0": (f"Human: {q}###Assistant:", f" {a}###", ""),
        "llama2": (f"{bos}[INST] {llama2}{q} [/INST]", f" {a} {eos}", ""),
        "llama3": (
            f"<|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            f"{a}<|eot_id|>",
            "",
        ),
        "mistral": (f" [INST] {s}{q} [/INST]", f" {a}{eos}", ""),
        "mistral_v3": (f"[INST] {s}{q}[/INST]", f" {a}{eos}", ""),
        "chatml": (f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>", "\n"),
        "phi3": (f"<|user|>\n{q}<|end|>\n<|assistant|>\n", f"{a}<|end|>", "\n"),
        "gemma": (f"<start_of_turn>user\n{s}{q}<end_of_turn>\n<start_of_turn>model\n", f"{a}<end_of_turn>", "\n"),
        "zephyr": (f"<|user|>\n{q}{eos}\n<|assistant|>\n", f"{a}{eos}", "\n"),
    }[template]
    return [(before, False), (answer, True), (after, False)]


def joined(pieces: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Pieces with neighbours of one kind joined and empty ones left out."""
    kinds = groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), kind) for kind, group in kinds]


def expected(template: str, tokenizer: str, sample: Sample) -> list[tuple[str, bool]]:
    chosen = TOKENIZERS[tokenizer]
    bos = (chosen.bos_token or "") if tokenizer in ADD_BOS or template == "plain" else ""
    return joined(expected_pieces(template, sample, bos, chosen.eos_token))


def decoded(template: str, tokenizer: str, sample: Sample) -> list[tuple[str, bool]]:
    """The encoded sample, an image as one token, as text in pieces that are supervised or not."""
    encoded = encoder(template, tokenizer, n_image_tokens=1).encode(sample)
    assert set(encoded.labels[encoded.labels != encoded.input_ids]) <= {IGNORED}
    tokens = zip(encoded.input_ids.tolist(), (encoded.labels != IGNORED).tolist(), strict=True)
    runs = [([token for token, _ in group], kind) for kind, group in groupby(tokens, key=lambda token: token[1])]
    return [(TOKENIZERS[tokenizer].decode(ids, clean_up_tokenization_spaces=False), kind) for ids, kind in runs]


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
@pytest.mark.parametrize("case", SAMPLES)
def test_exactly_the_answers_and_the_end_of_their_turns_are_supervised(case, template, tokenizer) -> None:
    assert decoded(template, tokenizer, SAMPLES[case]) == expected(template, tokenizer, SAMPLES[case])


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
@pytest.mark.parametrize("case", SAMPLES)
def test_images_take_their_tokens_where_they_stand_and_are_never_supervised(case, template, tokenizer) -> None:
    chat, sample = encoder(template, tokenizer), SAMPLES[case]
    encoded = chat.encode(sample)
    narrow = encoder(template, tokenizer, n_image_tokens=1).encode(sample).input_ids.tolist()
    widened = [i for i in narrow for _ in range(N_IMAGE_TOKENS if i == chat.image_token_id else 1)]
    assert encoded.input_ids.tolist() == widened
    is_image = encoded.input_ids == chat.image_token_id
    assert is_image.sum() == N_IMAGE_TOKENS * len(sample.images)
    assert (encoded.labels[is_image] == IGNORED).all()
    assert encoded.n_images == len(sample.images)


# SmolLM2's vocabulary lacks bytes of the highest code points; to Llama's, ▁ is a space.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁", max_codepoint=0x1FFFF)
MARKERS = st.sampled_from(
    [
        "USER:",
        "ASSISTANT:",
        "Human:",
        "#",
        "###",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
        "<|",
        "|>",
        "user\n",
        "\n",
    ]
)
TOKENS = {token for tokenizer in TOKENIZERS.values() for token in tokenizer.get_added_vocab()}
TEXT = st.lists(st.text(CHARACTERS, max_size=20) | MARKERS, max_size=4).map("".join).map(str.strip)
TEXT = TEXT.filter(lambda text: not any(token in text for token in TOKENS))
QUESTION = st.lists(TEXT | st.just("<image>"), min_size=1, max_size=3).map("\n".join).map(str.strip).filter(bool)
CONVERSATION = st.tuples(st.none() | TEXT.filter(bool), st.lists(st.tuples(QUESTION, TEXT), min_size=1, max_size=4))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(conversation=CONVERSATION, pair=st.sampled_from(PAIRS))
def test_random_conversations_supervise_exactly_their_answers(conversation, pair) -> None:
    system, turns = conversation
    sample = sample_of(*[text for turn in turns for text in turn], system=system)
    assert decoded(*pair, sample) == expected(*pair, sample)


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
@pytest.mark.parametrize("case", SAMPLES)
def test_each_prompt_of_use_is_the_beginning_of_the_training_text(template, case, tokenizer) -> None:
    chat, sample = encoder(template, tokenizer, n_image_tokens=1), SAMPLES[case]
    text, spans = chat.render(sample.turns)
    trained = chat.encode(sample)
    answers = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    for number, (start, _) in zip(answers, spans, strict=True):
        prompt, _ = chat.render(sample.turns[:number], prompt=True)
        assert text[:start] == prompt
        if template == "plain" and number > answers[0]:  # plain is for one answer; more follow each other
            continue
        ids = chat.tokenizer(prompt, add_special_tokens=False).input_ids
        assert trained.input_ids[: len(ids)].tolist() == ids
        assert trained.labels[len(ids)] != IGNORED
        assert trained.labels[len(ids) - 1] == IGNORED


@pytest.mark.parametrize("template", [t for t in CHAT_TEMPLATES if t not in ("plain", "llava_v0")])
def test_generation_stops_at_the_control_token_that_ends_an_answer(template) -> None:
    chat = encoder(template, "llama3")
    labels = chat.encode(SAMPLES["one turn"]).labels
    assert chat.end_of_turn_id() == labels[labels != IGNORED][-1]
    assert chat.stop_string() is None


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_generation_stops_at_a_text_where_no_control_token_ends_an_answer(tokenizer) -> None:
    chat = encoder("llava_v0", tokenizer)
    assert chat.stop_string() == "###"
    end = "###" if tokenizer == "smollm2" else chat.tokenizer.eos_token
    assert chat.tokenizer.decode([chat.end_of_turn_id()]) == end
    chat = encoder("plain", tokenizer)
    assert (chat.stop_string(), chat.tokenizer.decode([chat.end_of_turn_id()])) == ("\n", "\n")


def test_generation_stops_at_a_control_token_with_text_behind_it(tmp_path) -> None:
    text = load_template("chatml", TOKENIZERS["bytes"]).replace(
        "text_of(message) + '<|im_end|>' ", "text_of(message) + '<|im_end|>\\n' "
    )
    chat = ChatEncoder(TOKENIZERS["bytes"], text, 1, 100)
    assert chat.render((Turn("assistant", "A"),))[0] == "<|im_start|>assistant\nA<|im_end|>\n\n"
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id()) == "<|im_end|>"
    assert chat.stop_string() is None


@pytest.mark.parametrize(("template", "tokenizer"), PAIRS)
def test_a_begin_of_sequence_token_stands_where_the_tokenizer_adds_one_and_before_a_first_image(
    template, tokenizer
) -> None:
    chosen, chat = TOKENIZERS[tokenizer], encoder(template, tokenizer)
    input_ids = chat.encode(SAMPLES["many turns"]).input_ids.tolist()
    has_bos = tokenizer in ADD_BOS or template == "plain"
    if (template, tokenizer) == ("chatml", "smollm2"):  # whose token begins every turn of chatml
        assert input_ids.count(chosen.bos_token_id) == 6
    else:
        assert (input_ids[0] == chosen.bos_token_id) == has_bos
        assert input_ids.count(chosen.bos_token_id) == has_bos * (3 if template == "llama2" else 1)


@pytest.mark.parametrize("token", ["<|begin_of_text|>", "<|end_of_text|>", *CONTROL_TOKENS])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_control_token_in_a_text_is_refused(token, template) -> None:
    chat = encoder(template, "llama3")
    for number in range(3):
        texts = ["Hi", "So", "A"]
        texts[number] += f" {token}!"
        with pytest.raises(SampleError, match=rf"turn {number + 1}: the text holds the control token") as caught:
            chat.encode(sample_of(*texts[1:], system=texts[0]))
        assert caught.value.kind == "control_token"
        assert repr(token) in str(caught.value)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_end_of_a_sequence_is_text_where_it_is_no_token(template) -> None:
    sample = sample_of("Close it: <image> <s>", "a </s> b", "And?", "</s>")
    with pytest.raises(SampleError, match="turn 1: the text holds the control token '<s>'"):
        encoder(template, "llama").encode(sample)
    assert decoded(template, "llama3", sample) == expected(template, "llama3", sample)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (sample_of("<image>", "<image>"), "turn 2: <image> outside a user turn"),
        (sample_of("Hi", "A", system="<image>"), "turn 1: <image> outside a user turn"),
        (Sample("x", (), (Turn("user", "Write <image>."), Turn("assistant", "A"))), "1 <image> placeholders, but 0 im"),
        (Sample("x", (Path("0.png"),), (Turn("user", "Hi"), Turn("assistant", "A"))), "0 <image> placeholders, but 1"),
    ],
)
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_placeholder_that_stands_for_no_image_is_refused(sample, message, template) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        encoder(template).encode(sample)
    assert caught.value.kind == "placeholders"


def test_control_tokens_that_swallow_the_white_space_behind_them_are_supervised_alone() -> None:
    """As those of Phi-3."""
    tokenizer = add_control_tokens(byte_tokenizer(), rstrip=True)
    chat = ChatEncoder(tokenizer, load_template("phi3", tokenizer), 1, 200)
    encoded = chat.encode(sample_of("<image>\nWhat?", "A cat", "And?", ""))
    runs = groupby(encoded.labels.tolist(), key=lambda label: label != IGNORED)
    assert [tokenizer.decode(list(run)) for kind, run in runs if kind] == ["A cat<|end|>", "<|end|>"]


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


@pytest.mark.parametrize("over_long", ["error", "drop"])
def test_an_over_long_sample_is_not_encoded(over_long) -> None:
    with pytest.raises(OverLong, match=r"tokens, more than batch.max_sample_tokens \(20\)"):
        encoder("chatml", max_tokens=20, over_long=over_long).encode(SAMPLES["one turn"])


@settings(max_examples=300, deadline=None)
@given(max_tokens=st.integers(1, 200), case=st.sampled_from(list(SAMPLES)), template=st.sampled_from(CHAT_TEMPLATES))
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


def test_a_control_token_in_disguise_is_refused() -> None:
    """A normalizer may make one of wide characters, which no search for its text finds."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens(
        [AddedToken("<|im_start|>", normalized=True), AddedToken("<|stop|>", special=True, normalized=True)]
    )
    chat = ChatEncoder(tokenizer, load_template("chatml", tokenizer), 1, 200)
    assert chat.encode(sample_of("Hi |", "A")).n_tokens
    with pytest.raises(SampleError, match="for a control token") as caught:
        chat.encode(sample_of("Hi ＜｜stop｜＞", "A"))
    assert caught.value.kind == "control_token"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("message.content", "message.content | replace('<image>\\n<image>', '<image>')"), "writes 1 <image>"),
        (("message.role ==", "messages | length < 6 and message.role =="), "marks 0 of 3 answers"),
        (("<|im_start|>", "{{ 1 / (4 - messages | length) }}<|im_start|>"), "fails: ZeroDivisionError"),
    ],
)
def test_what_a_template_does_to_a_sample_that_it_was_not_tried_on_is_refused(change, message: str) -> None:
    own = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    chat = ChatEncoder(TOKENIZERS["bytes"], own.replace(*change), 1, 400)
    with pytest.raises(SampleError, match=message) as caught:
        samples = [sample_of("<image>\n<image>\na", "b"), sample_of("a", "b", "c", "d"), sample_of(*"abcdef")]
        for sample in samples:
            chat.encode(sample)
    assert caught.value.kind == "template_refuses"
