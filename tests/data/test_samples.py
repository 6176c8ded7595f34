from __future__ import annotations

from pathlib import Path

import pytest

from llava_train.data.formats import parse_record
from llava_train.data.pictures import EmbeddedPicture, PictureFile, PictureFolder, Pictures
from llava_train.data.problems import SampleError
from llava_train.data.samples import Sample, Turn

ROOT = Path("images")
PICTURES = Pictures(PictureFolder(ROOT))
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat "}]


def parse(**changes) -> Sample:
    return parse_record({"id": "a", "image": "b/c.jpg", "conversations": TURNS, **changes}, PICTURES, "0")


def test_a_record_becomes_a_sample() -> None:
    assert parse(model="") == Sample(
        "a", (PictureFile(ROOT / "b/c.jpg", (ROOT,)),), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat"))
    )


def test_a_system_turn_several_images_and_no_image_are_understood() -> None:
    system = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hi"},
    ]
    assert parse(conversations=system, image=[]).turns[0] == Turn("system", "Be brief.")
    two = [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "B"}]
    assert parse(conversations=two, image=["a.png", "b.png"]).images == (
        PictureFile(ROOT / "a.png", (ROOT,)),
        PictureFile(ROOT / "b.png", (ROOT,)),
    )


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"conversations": []}, "no_conversation", '"conversations" is missing, empty or not a list'),
        ({"conversations": [{"from": "human"}]}, "malformed_turn", "turn 1: a turn is"),
        ({"conversations": [{"from": "human", "value": 3}]}, "not_text", "turn 1: the text is 3, not a string"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown_role", "turn 1: unknown role 'bot'; known: human, user, gpt"),
        ({"conversations": None}, "no_conversation", '"conversations" is missing, empty or not a list'),
        ({"conversations": {"from": "human"}}, "no_conversation", '"conversations" is missing, empty or not a list'),
        ({"conversations": ["hello"]}, "malformed_turn", "turn 1: a turn is"),
        ({"conversations": [TURNS[0], {"from": None, "value": "x"}]}, "unknown_role", "turn 2: unknown role None; known: human"),
        ({"conversations": [{"from": [], "value": "x"}]}, "unknown_role", "turn 1: unknown role []; known: human"),
        ({"conversations": [{"from": "human", "value": "half \ud83d"}]}, "not_utf8", "turn 1: the text holds half of a character"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "roles_out_of_order", "roles out of order: ; wanted user"),
        ({"conversations": [*TURNS, {"from": "system", "value": "x"}, TURNS[1]]}, "roles_out_of_order", "roles out of order: user, assistant, system,"),
        ({"conversations": TURNS[::-1]}, "roles_out_of_order", "roles out of order: assistant, user; wanted user, assistant"),
        ({"conversations": TURNS[:1]}, "roles_out_of_order", "roles out of order: user;"),
        ({"image": None}, "placeholders", "1 <image> placeholders, but 0 images"),
        ({"image": ["a.png", "b.png"]}, "placeholders", "1 <image> placeholders, but 2 images"),
        ({"image": "../secret.png"}, "path_outside_root", "image path '../secret.png' leaves the image folder images"),
        ({"image": "/etc/passwd"}, "path_outside_root", "image path '/etc/passwd' leaves the image folder images"),
        ({"image": "a/../../secret.png"}, "path_outside_root", "leaves the image folder images"),
        ({"image": 3}, "image_value", '"image" is a path, bytes or a list of them, not 3'),
        ({"image": {"a.png": 1}}, "image_value", '"image" is a path, bytes or a list of them, not {'),
        ({"image": [""]}, "placeholders", "1 <image> placeholders, but 0 images"),
        ({"image": [3]}, "image_value", '"image" is a path, bytes or a list of them, not 3'),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "see <image>"}]}, "placeholders", "<image> outside a user turn"),
        ({"conversations": [{"from": "system", "value": "<image>"}, *TURNS]}, "placeholders", "<image> outside a user turn"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_conversation_is_refused(changes: dict, kind: str, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse(**changes)
    assert message in str(caught.value)
    assert caught.value.kind == kind


@pytest.mark.parametrize("record", [3, [], "x"])
def test_a_record_that_is_no_object_is_refused(record) -> None:
    with pytest.raises(SampleError, match="a record is a JSON object") as caught:
        parse_record(record, PICTURES, "0")
    assert caught.value.kind == "not_an_object"


def chat(*contents, images=(), **record) -> Sample:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return parse_record({"messages": messages, "images": list(images), **record}, PICTURES, "7")


TEXT, IMAGE = {"type": "text", "text": "Which?"}, {"type": "image"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Which?", "<image>\nWhich?"),
        ("Which <image> is it?", "Which <image> is it?"),
        ([IMAGE, TEXT], "<image>\nWhich?"),
        ([TEXT, IMAGE], "Which?\n<image>"),
        ([TEXT, IMAGE, TEXT], "Which?\n<image>\nWhich?"),
        (
            [{"type": "image", "text": None}, {"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
            "<image>\nAB",
        ),
    ],
)
def test_chat_messages_hold_their_image_as_text_as_part_or_in_a_list(content, text: str) -> None:
    sample = chat(content, " A cat ", images=["a.png"])
    assert sample == Sample(
        "7", (PictureFile(ROOT / "a.png", (ROOT,)),), (Turn("user", text), Turn("assistant", "A cat"))
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)
def test_a_part_may_hold_its_own_image(part: dict) -> None:
    sample = chat([part, TEXT, IMAGE], "A", images=["b.png"])
    assert [str(picture) for picture in sample.images] == ["images/a.png", "images/b.png"]
    assert sample.turns[0].text == "<image>\nWhich?\n<image>"


def test_images_of_later_messages_and_a_system_message_are_understood() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "content": [IMAGE, IMAGE, TEXT]},
        {"role": "assistant", "content": "B"},
    ]
    sample = parse_record({"messages": messages, "images": [b"1", {"bytes": b"2", "path": None}]}, PICTURES, "0")
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert sample.turns[3].text == "<image>\n<image>\nWhich?"
    assert sample.images == (EmbeddedPicture(b"1"), EmbeddedPicture(b"2"))


def test_the_cauldrons_pairs_have_their_images_first() -> None:
    texts = [{"user": "Which?\n", "assistant": " A", "source": "x"}, {"user": "And?", "assistant": "B"}]
    sample = parse_record({"images": [{"bytes": b"1", "path": "1.png"}, b"2"], "texts": texts}, PICTURES, "3")
    assert [turn.text for turn in sample.turns] == ["<image>\n<image>\nWhich?", "A", "And?", "B"]
    assert (sample.id, [str(picture) for picture in sample.images]) == ("3", ["1.png", "embedded picture"])
    assert parse_record({"images": [], "texts": texts}, PICTURES, "3").turns[0].text == "Which?"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"texts": []}, "no_conversation"),
        ({"messages": []}, "no_conversation"),
        ({"texts": [{"user": "a"}]}, "malformed_turn"),
        ({"texts": [{"user": "a", "assistant": None}]}, "not_text"),
        ({"texts": [{"user": "what is <image>?", "assistant": "a tag"}], "images": [b"1"]}, "placeholders"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user"}]}, "malformed_turn"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "video_or_sound"),
        ({"messages": [{"role": "user", "content": [{"type": "tool"}]}]}, "malformed_turn"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "malformed_turn"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}], "images": [b"1"]}, "placeholders"),
        ({"messages": [{"role": "user", "content": [IMAGE, TEXT]}, {"role": "assistant", "content": "x"}]}, "placeholders"),
        ({"messages": [{"role": "user", "content": [TEXT]}, {"role": "assistant", "content": "x"}], "images": [b"1"]}, "placeholders"),
        ({"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]}, "placeholders"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "images": ["https://x.org/a.png"]}, "image_remote"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "images": ["data:,x"]}, "image_value"),
    ],
)  # fmt: skip
def test_chats_and_pairs_that_are_none_are_refused(record: dict, kind: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_record(record, PICTURES, "0")
    assert caught.value.kind == kind


def test_parts_may_name_their_image_by_its_index() -> None:
    parts = [{"type": "image", "index": 1, "text": None}, {**TEXT, "index": None}, {"type": "image", "index": 0}]
    sample = chat(parts, "A", images=["a.png", "b.png"])
    assert [str(picture) for picture in sample.images] == ["images/b.png", "images/a.png"]
    for index in (2, -1):
        with pytest.raises(SampleError, match="2 image parts do not fit the 2 images"):
            chat([{"type": "image", "index": index}, IMAGE | {"index": 0}, TEXT], "A", images=["a.png", "b.png"])


def test_keys_that_arrow_adds_without_a_value_are_passed_over() -> None:
    messages = [
        {"from": None, "value": None, "role": "user", "content": "<image>Hi"},
        {"from": "gpt", "value": "Hello", "role": None, "content": None},
    ]
    sample = parse_record({"conversations": messages, "image": [], "images": ["a.png"]}, PICTURES, "0")
    assert [(turn.role, turn.text) for turn in sample.turns] == [("user", "<image>Hi"), ("assistant", "Hello")]
    assert [str(picture) for picture in sample.images] == ["images/a.png"]


def test_a_conversation_in_columns_is_read_by_rows() -> None:
    columns = {"from": ["human", "gpt"], "value": ["<image>What?", "A cat"]}
    assert parse(conversations=columns).turns == (Turn("user", "<image>What?"), Turn("assistant", "A cat"))
