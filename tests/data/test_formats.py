"""Records of all formats, good and spoiled: what names a picture never becomes good text, and nothing else is raised."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_train.data.formats import parse_record, picture_markup, unread_paths
from llava_train.data.formats.values import is_media_key, is_missing, is_picture_key, picture_values
from llava_train.data.images import decode_image
from llava_train.data.pictures import EmbeddedPicture, PictureFolder, Pictures
from llava_train.data.problems import KINDS, SampleError
from llava_train.data.samples import Sample, Turn, has_visible_text
from llava_train.data.sources import open_source
from llava_train.errors import UserError
from llava_train.use.questions import read_questions

PICTURES = Pictures(PictureFolder(Path("images")))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (250, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parse(record: Any) -> Sample:
    return parse_record(record, PICTURES, "0")


def kind_of(record: Any) -> str:
    with pytest.raises(SampleError) as caught:
        parse(record)
    assert str(caught.value)
    return caught.value.kind


TALK = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A dog."}]
SHOWN = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


# Pictures, videos and sounds under keys that nothing reads.


@pytest.mark.parametrize(
    "key",
    ["image_path", "img", "Image", "IMAGE", "image_file", "picture", "pictures", "pic", "photo", "photo_url", "imgs"]
    + [
        "imagePath",
        "image-name",
        "images_path",
        "imagefile",
        "image_0",
        "input_image",
        "imgae",
        "file",
        "path",
        "source",
    ],
)
@pytest.mark.parametrize("value", ["a.png", ["a.jpg"], {"path": "b/c.webp"}, "a.PNG?size=3", "https://x.org/a.jpeg"])
def test_a_picture_under_a_key_that_nothing_reads_is_refused(key: str, value: Any) -> None:
    assert kind_of({"id": 0, key: value, "conversations": TALK}) == "unread_picture"
    assert kind_of(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}], key: value}
    ) == ("unread_picture")
    inside = [{**TALK[0], key: value}, TALK[1]]
    assert kind_of({"conversations": inside}) == ("unread_picture")


@pytest.mark.parametrize("key", ["img", "picture", "Image", "image_file", "image_id"])
@pytest.mark.parametrize("value", ["coco/000000033471", 33471])
def test_a_spelling_of_image_is_refused_whatever_it_names(key: str, value: Any) -> None:
    if key == "image_file" and isinstance(value, int):
        value = [str(value)]
    assert kind_of({key: value, "conversations": TALK}) == "unread_picture"


@pytest.mark.parametrize(
    "turn_key", [{"image": "a.png"}, {"images": ["a.png"]}, {"images": [{"bytes": png(), "path": None}]}]
)
def test_a_picture_inside_a_turn_is_refused(turn_key: dict[str, Any]) -> None:
    assert kind_of({"conversations": [{**TALK[0], **turn_key}, TALK[1]]}) == "unread_picture"
    messages = [{"role": "user", "content": "Hi", **turn_key}, {"role": "assistant", "content": "x"}]
    assert kind_of({"messages": messages}) == "unread_picture"
    assert kind_of({"texts": [{"user": "Hi", "assistant": "x", **turn_key}]}) == "unread_picture"
    part = {"type": "text", "text": "Hi", "file": "a.png"}
    assert kind_of({"messages": [{"role": "user", "content": [part]}, messages[1]]}) == "unread_picture"


@pytest.mark.parametrize("value", [None, float("nan"), "", " ", [], [None], [""], {}, {"bytes": None, "path": None}])
@pytest.mark.parametrize("key", ["image", "images", "img", "video", "tools", "system", "history"])
def test_a_value_that_is_missing_is_none(key: str, value: Any) -> None:
    assert is_missing(value)
    assert parse({"conversations": TALK, key: value}) == parse({"conversations": TALK})


@pytest.mark.parametrize(
    "metadata",
    [
        {"image_size": [3, 4]},
        {"image_width": 3},
        {"n_images": 0},
        {"image_count": 2},
        {"has_image": False},
        {"image_caption": "A dog"},
        {"source": "web"},
        {"model": ""},
        {"score": 0.5},
        {"ratings": [1, 2]},
        {"caption": "see a.png there"},
    ],
)
def test_keys_that_only_describe_are_passed_over_and_listed(metadata: dict[str, Any]) -> None:
    record = {"conversations": TALK, **metadata}
    assert parse(record) == parse({"conversations": TALK})
    assert unread_paths(record) == [key for key, value in metadata.items() if value != ""]


def test_other_names_of_a_stated_picture_are_no_other_picture() -> None:
    known = {"image": "coco/a.jpg", "conversations": SHOWN}
    for more in (
        {"image_path": "/data/coco/a.jpg"},
        {"file_name": "a.png"},
        {"coco_url": "http://x.org/12.jpg"},
        {"image_id": 7},
    ):
        assert len(parse({**known, **more}).images) == 1
    assert kind_of({**known, "image2": "b.jpg"}) == "unread_picture"
    assert kind_of({**known, "mask": "coco/a_mask.jpg"}) == "unread_picture"
    assert len(parse({**known, "thumbnail": {"bytes": png(), "path": "t.png"}}).images) == 1
    assert kind_of({**known, "picture2": png()}) == "unread_picture"
    embedded = {"image": {"bytes": png(), "path": None}, "file_name": "a.png", "conversations": SHOWN}
    assert len(parse(embedded).images) == 1
    assert kind_of({**known, "images": ["b.jpg"]}) == "unread_picture"
    assert len(parse({**known, "images": ["coco/a.jpg"]}).images) == 1


@pytest.mark.parametrize(
    "media",
    [
        {"video": "v.mp4"},
        {"videos": ["v.avi"]},
        {"video_path": "clips/3"},
        {"audio": "a.wav"},
        {"audios": [{"path": "a.mp3", "bytes": None}]},
        {"sound": "x.flac"},
        {"clip": "x.webm"},
        {"Video": "v"},
        {"image": "v.mp4"},
    ],
)
def test_videos_and_sounds_are_refused(media: dict[str, Any], tmp_path: Path) -> None:
    asked = [{"from": "human", "value": "<video>\nWhat?"}, TALK[1]]
    assert kind_of({**media, "conversations": asked}) == "video_or_sound"
    question = tmp_path / "q.jsonl"
    question.write_text(json.dumps({"text": "What?", "answer": "A dog.", **media}))
    with pytest.raises(UserError, match="q.jsonl:1: .*a video or a sound"):
        read_questions(question, "exact")


def test_media_in_turns_and_parts_are_refused_and_the_bare_word_is_text() -> None:
    assert kind_of({"conversations": [{**TALK[0], "audio": "a.wav"}, TALK[1]]}) == "video_or_sound"
    for kind in ("video", "video_url", "audio", "input_audio"):
        parts = [{"type": kind, kind: "x"}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
        assert kind_of({"messages": messages}) == "video_or_sound"
    asked = [{"from": "human", "value": "What does <video> mean in HTML?"}, TALK[1]]
    assert parse({"conversations": asked}).turns[0].text == "What does <video> mean in HTML?"


@pytest.mark.parametrize(
    "text",
    ["![](a.png) Hi", "![a dog](b/c.jpg)", "<img>a.png</img>", '<img src="a.png">', "<image_1> Hi"]
    + ["<Image> Hi", "<img_1>", "[image]", "<IMG_CONTEXT>", "<start_of_image>", "data:image/png;base64,iVBORw0KGgo="],
)
def test_markup_of_a_picture_is_noticed_where_the_record_states_none(text: str) -> None:
    asked = [{"from": "human", "value": text}, TALK[1]]
    assert picture_markup(parse({"conversations": asked})) is not None
    assert picture_markup(parse({"conversations": TALK})) is None
    shown = [{"from": "human", "value": f"<image>\n{text}"}, TALK[1]]
    assert picture_markup(parse({"image": "a.png", "conversations": shown})) is None


def test_keys_are_told_from_words() -> None:
    assert is_picture_key("imageURL", "x")
    assert is_picture_key("userImages", ["x"])
    assert not is_picture_key("imagination", "x")
    assert not is_picture_key("image_format", "png")
    assert not is_picture_key("page", "x")
    assert is_media_key("audioFile", "x")
    assert not is_media_key("video_caption", "A dog runs.")
    assert list(picture_values({"a": [{"b": "x.png"}], "c": "no"})) == ["x.png"]


# Instructions, loss flags, empty answers.


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_of_the_record_is_the_system_turn(key: str) -> None:
    for record in ({"conversations": TALK}, {"texts": [{"user": "What is it?", "assistant": "A dog."}]}):
        assert parse({**record, key: " Be brief. "}).turns[0] == Turn("system", "Be brief.")
    with_own = [{"from": "system", "value": "Be brief."}, *TALK]
    assert parse({"conversations": with_own, key: "Be brief."}).turns[0] == Turn("system", "Be brief.")
    assert kind_of({"conversations": with_own, key: "Be long."}) == "unsupported_key"
    assert kind_of({"conversations": TALK, key: ["x"]}) == "not_text"


@pytest.mark.parametrize(
    "flag", [{"loss": False}, {"train": False}, {"weight": 0}, {"loss_weight": 0.0}, {"trainable": False}]
)
def test_a_loss_flag_leaves_its_turn_out_of_training(flag: dict[str, Any]) -> None:
    four = [*TALK, TALK[0], {**TALK[1], **flag}]
    assert [turn.supervised for turn in parse({"conversations": four}).turns] == [True, True, True, False]
    on = {key: 1 - value for key, value in flag.items()}
    assert parse({"conversations": [TALK[0], {**TALK[1], **on}]}) == parse({"conversations": TALK})
    assert parse({"conversations": [{**TALK[0], **flag}, TALK[1]]}) == parse({"conversations": TALK})
    pairs = [{"user": "a", "assistant": "b", **flag}, {"user": "a", "assistant": "b"}]
    assert [turn.supervised for turn in parse({"texts": pairs}).turns] == [True, False, True, True]


@pytest.mark.parametrize(
    "flag", [{"weight": 0.5}, {"loss": "no"}, {"loss": True, "train": False}, {"mask": True}, {"Loss": False}]
)
def test_a_loss_flag_that_cannot_be_followed_is_refused(flag: dict[str, Any]) -> None:
    assert kind_of({"conversations": [TALK[0], {**TALK[1], **flag}]}) == "unsupported_key"
    assert kind_of({"conversations": [{**TALK[0], "train": True}, TALK[1]]}) == "unsupported_key"


@pytest.mark.parametrize(
    "more",
    [
        {"history": [["a", "b"]]},
        {"tools": "[{}]"},
        {"chosen": "x", "rejected": "y"},
        {"rejected_response": "y"},
        {"label": False},
        {"weight": 0.5},
        {"loss": False},
        {"reasoning_content": "Because."},
        {"System": "Be brief."},
        {"messages": [{"role": "user", "content": "x"}]},
        {"instruction": "Answer in French."},
    ],
)
def test_what_changes_the_meaning_and_is_not_supported_is_refused(more: dict[str, Any]) -> None:
    assert kind_of({"conversations": TALK, **more}) == "unsupported_key"


@pytest.mark.parametrize(
    "more", [{"reasoning_content": "Because."}, {"tool_calls": [{"function": {"name": "f"}}]}, {"thinking": "Hm."}]
)
def test_of_a_turn_too(more: dict[str, Any]) -> None:
    answer = {"role": "assistant", "content": "", **more}
    assert kind_of({"messages": [{"role": "user", "content": "x"}, answer]}) == "unsupported_key"
    assert kind_of({"messages": [{"role": "user", "content": "x"}, {**answer, "content": None}]}) == "unsupported_key"


@pytest.mark.parametrize("empty", ["", "  \n", "\u200b", "\ufeff\u200d", "\u00ad", "\u2800", "\u3164", "\u2060\ufe0f"])
def test_an_answer_without_a_visible_character_is_refused_in_any_turn(empty: str) -> None:
    assert not has_visible_text(empty)
    nothing = {"from": "gpt", "value": empty}
    assert kind_of({"conversations": [TALK[0], nothing]}) == "empty_answer"
    assert kind_of({"conversations": [TALK[0], nothing, *TALK]}) == "empty_answer"
    assert kind_of({"texts": [{"user": "a", "assistant": empty}]}) == "empty_answer"
    assert not parse({"conversations": [TALK[0], {**nothing, "loss": False}, *TALK]}).turns[1].supervised


# Images: bytes, base64, addresses.


def test_rows_of_parquet_with_binary_pictures_are_read(tmp_path: Path) -> None:
    content, talk = png(), [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    part = [{"type": "image", "image": content, "text": None}, {"type": "text", "image": None, "text": "What?"}]
    answer = [{"type": "text", "image": None, "text": "A dog."}]
    typed = [[{"role": "user", "content": part}, {"role": "assistant", "content": answer}]]
    chat = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]]
    tables = {
        "image": pa.table({"image": pa.array([content]), "conversations": pa.array([talk])}),
        "large": pa.table({"image": pa.array([content], pa.large_binary()), "conversations": pa.array([talk])}),
        "fixed": pa.table({"image": pa.array([content], pa.binary(len(content))), "conversations": pa.array([talk])}),
        "list": pa.table({"images": pa.array([[content]], pa.list_(pa.binary())), "messages": pa.array(chat)}),
        "parts": pa.table({"messages": pa.array(typed)}),
        "both": pa.table({"image": pa.array([content]), "images": pa.array([[content]]), "messages": pa.array(chat)}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / name)
        sample = open_source(tmp_path / name, cache=tmp_path / "cache")[0]
        assert [turn.text for turn in sample.turns] == ["<image>\nWhat?", "A dog."], name
        assert decode_image(sample.images[0]).size == (8, 6)
    unread = pa.table({"img": pa.array([content]), "conversations": pa.array([TALK])})
    pq.write_table(unread, tmp_path / "unread")
    with pytest.raises(SampleError, match='key "img" names a picture'):
        open_source(tmp_path / "unread", cache=tmp_path / "cache")[0]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_bare_base64_is_a_picture(encode: Callable[[bytes], bytes], kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(buffer, kind)
    text = encode(buffer.getvalue()).decode()
    (picture,) = parse({"image": text, "conversations": SHOWN}).images
    assert picture == EmbeddedPicture(buffer.getvalue())
    assert decode_image(picture).size == (40, 30)
    assert kind_of({"img": text, "conversations": TALK}) == "unread_picture"
    damaged = text.rstrip("=\n") + "!" * 5
    with pytest.raises(SampleError) as caught:
        parse({"image": damaged * 50, "conversations": SHOWN})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        ("file:///data/a%20b.png", "image_value", "write the path: '/data/a b.png'"),
        ("s3://bucket/a.png", "image_remote", "download it first"),
        ("https://x.org/a.png", "image_remote", "download it first"),
        ("C:\\data\\a.png", "image_value", "a path of Windows"),
        ("x" * 120_000, "image_value", "neither a path nor the base64 of a picture"),
        (["a.png", "\0"], "placeholders", "1 <image> placeholders, but 2 images"),
        (True, "image_value", "not True"),
        ({"name": "a"}, "image_value", "not {'name': 'a'}"),
    ],
)
def test_what_is_no_path_is_named_and_short(image: Any, kind: str, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse({"image": image, "conversations": SHOWN})
    assert caught.value.kind == kind
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_file_of_another_spelling_is_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a b.png", "b/c.png"):
        (tmp_path / name).write_bytes(png())
    pictures = Pictures(PictureFolder(tmp_path))
    for written, right in (("a%20b.png", "a b.png"), ("b\\c.png", "b/c.png")):
        with pytest.raises(SampleError, match=f"the image file is missing.*write .*{right}") as caught:
            decode_image(pictures.picture(written))
        assert caught.value.kind == "image_missing"


def test_long_ids_and_names_are_shortened() -> None:
    sample = parse({"id": "x" * 120_000, "image": "a" * 3000 + ".png", "conversations": SHOWN})
    assert len(sample.id) < 300
    assert "120,000 characters" in sample.id
    assert len(str(sample.images[0])) < 300


# Other formats.


def test_alpaca_and_query_response_are_read() -> None:
    alpaca = {
        "instruction": "Translate.",
        "input": "Hund",
        "output": "dog",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "images": ["a.png"],
    }
    assert parse(alpaca).turns == (
        Turn("system", "Be brief."),
        Turn("user", "<image>\nHi"),
        Turn("assistant", "Hello"),
        Turn("user", "Translate.\nHund"),
        Turn("assistant", "dog"),
    )
    assert parse({"instruction": "Hi", "input": "", "output": "x"}).turns == (
        Turn("user", "Hi"),
        Turn("assistant", "x"),
    )
    query = {"query": "What is <image>?", "response": "A dog.", "images": ["a.png"], "history": []}
    assert parse(query).turns == (Turn("user", "What is <image>?"), Turn("assistant", "A dog."))
    assert kind_of({**query, "rejected_response": "A cat."}) == "unsupported_key"
    assert kind_of({**query, "history": ["a", "b"]}) == "malformed_turn"
    assert kind_of({**query, "response": ""}) == "empty_answer"


def test_typed_parts_may_use_value() -> None:
    parts = [{"type": "image", "value": "a.png"}, {"type": "text", "value": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "value": "A dog."}], "loss_weight": 1.0}
    sample = parse({"messages": [{"role": "user", "content": parts, "loss_weight": 0.0}, answer]})
    assert [turn.text for turn in sample.turns] == ["<image>\nWhat?", "A dog."]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"data": [{"conversations": TALK}]}, ['"data"', '"conversations"', 'the list under "data"']),
        ({"a": {"conversations": TALK}, "b": {"conversations": TALK}}, ['"a", "b"', "save the values as a list"]),
        ({"id": {"0": 1}, "conversations": {"0": TALK}}, ["orient"]),
        ({"question": "a", "answer": "b"}, ['Name "question" "query" and "answer" "response"']),
        ({"prompt": "a", "completion": "b"}, ['found the keys "prompt", "completion"']),
        ({"conversations": json.dumps(TALK)}, ["is a text, not a list", "JSON"]),
        ({"Conversations": TALK}, ['Name the key "Conversations" "conversations"']),
        ({"text": "x"}, ['found the keys "text"', '"messages"', '"instruction" with "output"']),
        ({}, ["the record is empty"]),
        ({"conversations": {"from": ["human"], "value": ["a", "b"]}}, ["different lengths"]),
        ({"conversations": [{"speaker": "human", "text": "x"}]}, ["not one with the keys speaker, text"]),
        ({"k" * 5000: 1, **{str(i): i for i in range(50)}}, ["and 41 more"]),
    ],
)
def test_an_unknown_shape_names_its_keys_and_what_is_known(record: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SampleError) as caught:
        parse(record)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 900


# A property: mutations of good records, each with what must become of it.

WORD = st.text("abcdefghij klmno", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@dataclass(frozen=True)
class Good:
    """A good record, the key of its turns and the sample that it is."""

    record: dict[str, Any]
    turns_key: str | None
    sample: Sample


@st.composite
def good_records(draw: st.DrawFn) -> Good:
    pairs = draw(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3))
    images = draw(st.lists(st.sampled_from(["a.png", "b/c.jpg", png()]), max_size=2))
    shape = draw(st.sampled_from(["conversations", "messages", "parts", "texts", "query", "instruction"]))
    first = f"{'<image>' * len(images)}{pairs[0][0]}"
    asked = [(first if i == 0 else question, answer) for i, (question, answer) in enumerate(pairs)]
    record: dict[str, Any] = {"images": list(images)} if images else {}
    if shape == "conversations":
        record["conversations"] = [
            {"from": role, "value": text} for pair in asked for role, text in zip(("human", "gpt"), pair, strict=True)
        ]
    elif shape == "messages":
        record["messages"] = [
            {"role": role, "content": text}
            for pair in asked
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    elif shape == "parts":
        record["messages"] = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        record["messages"][0]["content"][:0] = [{"type": "image"}] * len(images)
    elif shape == "texts":
        record["texts"] = [{"user": question, "assistant": answer} for question, answer in pairs]
    else:
        question, answer = asked[-1]
        names = ("query", "response") if shape == "query" else ("instruction", "output")
        record |= {names[0]: question, names[1]: answer, "history": [list(pair) for pair in asked[:-1]]}
    turns_key = next((key for key in ("conversations", "messages", "texts") if key in record), None)
    return Good(record, turns_key, parse(record))


Mutation = tuple[str, Callable[[dict[str, Any]], Any], str | Callable[[Sample], Sample]]
"""A name; what is done to the record; the kind of problem that it must have, or the sample that it must be."""


def at_record(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.update(more)


def unchanged(sample: Sample) -> Sample:
    return sample


def with_system(sample: Sample) -> Sample:
    return replace(sample, turns=(Turn("system", "Be kind."), *sample.turns))


MUTATIONS_OF_RECORDS: list[Mutation] = [
    ("unread picture", at_record(image_path=["z.png", "y.png", "x.png"]), "unread_picture"),
    ("unread spelling", at_record(Picture=["z.png", "x.png", "y.png"]), "unread_picture"),
    ("unread nested picture", at_record(meta={"files": ["z.webp", "y.webp"], "more": ["x.gif"]}), "unread_picture"),
    ("unread bytes", at_record(picture2=png()), "unread_picture"),
    ("video", at_record(video="v.mp4"), "video_or_sound"),
    ("sound", at_record(audio_path="v.wav"), "video_or_sound"),
    ("tools", at_record(tools=[{"name": "f"}]), "unsupported_key"),
    ("preference", at_record(rejected="no"), "unsupported_key"),
    ("record weight", at_record(weight=0.3), "unsupported_key"),
    ("system", at_record(system="Be kind."), with_system),
    ("missing values", at_record(img=None, video=math.nan, tools=[], audio="", chosen=[None]), unchanged),
    ("metadata", at_record(score=0.3, image_width=8, source="web", tags=["a", "b"]), unchanged),
    ("an id", at_record(id="7"), lambda sample: replace(sample, id="7")),
    ("no picture is named", lambda record: record.update(images=[*record.get("images", []), None, ""]), unchanged),
]  # fmt: skip
MUTATIONS_OF_TURNS: list[Mutation] = [
    ("picture in the turn", lambda turn: turn.update(image="z.png"), "unread_picture"),
    ("video in the turn", lambda turn: turn.update(video="z.mp4"), "video_or_sound"),
    ("reasoning", lambda turn: turn.update(reasoning_content="So."), "unsupported_key"),
    ("half a weight", lambda turn: turn.update(weight=0.5), "unsupported_key"),
    ("flag off", lambda turn: turn.update(loss=False), lambda sample: replace(
        sample, turns=(*sample.turns[:-1], replace(sample.turns[-1], supervised=False)))),
    ("flag on", lambda turn: turn.update(weight=1), unchanged),
    ("missing", lambda turn: turn.update(tool_calls=None, image=math.nan), unchanged),
    ("a score", lambda turn: turn.update(score=3), unchanged),
]  # fmt: skip


def check_verdict(good: Good, record: Any, verdict: str | Callable[[Sample], Sample]) -> None:
    if isinstance(verdict, str):
        assert verdict in KINDS
        assert kind_of(record) == verdict
    else:
        assert parse(record) == verdict(good.sample)


@given(good_records(), st.sampled_from(MUTATIONS_OF_RECORDS))
def test_each_mutation_of_a_record_has_its_verdict(good: Good, mutation: Mutation) -> None:
    record = copy.deepcopy(good.record)
    mutation[1](record)
    check_verdict(good, record, mutation[2])


@given(good_records().filter(lambda good: good.turns_key == "conversations"), st.sampled_from(["z.png", png(), 3]))
def test_a_picture_without_a_placeholder_is_refused(good: Good, picture: Any) -> None:
    more = {**good.record, "images": [*good.record.get("images", []), picture]}
    assert kind_of(more) == "placeholders"
    if good.sample.images:
        assert kind_of({**good.record, "images": [3] * len(good.sample.images)}) == "image_value"


@given(good_records().filter(lambda good: good.turns_key is not None), st.sampled_from(MUTATIONS_OF_TURNS))
def test_each_mutation_of_the_last_turn_has_its_verdict(good: Good, mutation: Mutation) -> None:
    record = copy.deepcopy(good.record)
    mutation[1](record[good.turns_key][-1])
    check_verdict(good, record, mutation[2])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("z.png") | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "url", "bytes", "path", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = [
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "texts",
    "system",
    "history",
    "query",
    "response",
    "instruction",
]
KEYS += [
    "input",
    "output",
    "from",
    "value",
    "role",
    "content",
    "loss",
    "weight",
    "img",
    "video",
    "tools",
    "label",
    "objects",
]


@given(good_records(), st.sampled_from(KEYS), JSON_VALUES, st.booleans())
def test_whatever_a_key_holds_only_a_sample_error_is_raised_and_no_picture_is_lost(
    good: Good, key: str, value: Any, in_turn: bool
) -> None:
    record = copy.deepcopy(good.record)
    (record[good.turns_key][-1] if in_turn and good.turns_key else record)[key] = value
    unread_paths(record)
    try:
        sample = parse(record)
    except SampleError:
        return
    named = [name for name in picture_values(record) if isinstance(name, str)]
    assert bool(sample.images) or not named or key in ("id", "system", "history", "query", "response", *_TEXT_KEYS)


_TEXT_KEYS = (
    "value",
    "content",
    "instruction",
    "input",
    "output",
    "conversations",
    "messages",
    "texts",
    "from",
    "role",
)
"""Keys whose value is a text that is trained on: a file name there is a text."""


def each_place(record: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each holder and key of a record, however deep."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for key, value in items:
        yield record, key
        yield from each_place(value)


@given(good_records(), st.data(), JSON_VALUES)
def test_whatever_stands_anywhere_only_a_sample_error_is_raised(good: Good, data: st.DataObject, value: Any) -> None:
    record = copy.deepcopy(good.record)
    holder, key = data.draw(st.sampled_from(list(each_place(record))))
    holder[key] = value
    try:
        assert parse(record).turns
    except SampleError as error:
        assert len(str(error)) < 1200


# Turns and texts that tables keep in other ways, parts of every kind, and more spellings.


def asked_by(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A dog."}]}


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ({"image": ["a.png", None]}, "unread_picture"),
        ({"video": ["a.mp4", None]}, "video_or_sound"),
        ({"reasoning_content": [None, "Hm."]}, "unsupported_key"),
        ({"train_on": [None, False]}, "unsupported_key"),
    ],
)
def test_turns_as_columns_are_read_like_turns_as_objects(column: dict[str, list[Any]], kind: str) -> None:
    columns = {"from": ["human", "gpt"], "value": ["What is it?", "A dog."]}
    assert parse({"conversations": columns}) == parse({"conversations": TALK})
    assert kind_of({"conversations": {**columns, **column}}) == kind
    pairs = {"user": ["What is it?"], "assistant": ["A dog."]}
    assert parse({"texts": pairs}) == parse({"conversations": TALK})
    assert kind_of({"texts": {**pairs, "image": ["a.png"]}}) == "unread_picture"
    content = {"type": ["image", "text"], "text": [None, "What?"]}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    assert parse({"messages": messages, "images": ["a.png"]}).turns[0].text == "<image>\nWhat?"


@pytest.mark.parametrize("more", [{"image": "a.png"}, {"path": "a.png"}, {"image": {"bytes": png(), "path": None}}])
def test_a_picture_in_a_part_of_text_is_refused(more: dict[str, Any]) -> None:
    assert kind_of(asked_by({"type": "text", "text": "What?", **more})) == "unread_picture"


def test_a_part_is_one_picture_and_has_no_text() -> None:
    text = {"type": "text", "text": "What?"}
    assert kind_of(asked_by({"type": "image", "image": "a.png", "text": "A caption"}, text)) == "malformed_turn"
    assert kind_of(asked_by({"type": "image", "image": "a.png", "path": "b.png"}, text)) == "malformed_turn"
    for same in ({"path": "a.png"}, {"url": "https://x.org/1"}, {"text": None}, {"index": 0}):
        assert len(parse(asked_by({"type": "image", "image": "a.png", **same}, text)).images) == 1


@pytest.mark.parametrize("empty", ["", " ", float("nan"), None])
def test_a_text_is_not_hidden_by_an_empty_one(empty: Any) -> None:
    turns = [{"from": "human", "value": empty, "content": "What is it?"}, TALK[1]]
    assert parse({"conversations": turns}) == parse({"conversations": TALK})


@pytest.mark.parametrize(
    "key",
    ["loss_mask", "lossMask", "compute_loss", "is_loss", "train_on", "train_on_turn", "training", "weights", "Train"],
)
def test_other_spellings_of_a_loss_flag_are_refused_unless_they_are_on(key: str) -> None:
    for off in (False, 0, 0.0, "false"):
        assert kind_of({"conversations": [TALK[0], {**TALK[1], key: off}]}) == "unsupported_key"
        assert kind_of({"conversations": TALK, key: off}) == "unsupported_key"
    for on in (True, 1):
        assert parse({"conversations": [TALK[0], {**TALK[1], key: on}]}) == parse({"conversations": TALK})
        assert parse({"conversations": TALK, key: on}) == parse({"conversations": TALK})
    for harmless in ({"train_id": 0}, {"weight_kg": 0}, {"loss_value": 0.3}):
        assert parse({"conversations": [TALK[0], {**TALK[1], **harmless}]}) == parse({"conversations": TALK})


@pytest.mark.parametrize("key", ["is_masked", "masking", "skip", "no_train", "ignore_loss"])
def test_a_flag_that_masks_a_turn_is_refused(key: str) -> None:
    assert kind_of({"conversations": [TALK[0], {**TALK[1], key: True}]}) == "unsupported_key"
    assert parse({"conversations": [TALK[0], {**TALK[1], key: False}]}) == parse({"conversations": TALK})


@pytest.mark.parametrize(
    "more",
    [
        {"sys": "Be brief."},
        {"system_instruction": "Be brief."},
        {"sysprompt": "Be brief."},
        {"task_instruction": "Answer in French."},
        {"chat_history": [["a", "b"]]},
        {"thinking_content": "Hm."},
        {"chain_of_thought": "Hm."},
        {"reasoning_details": [{"text": "Hm."}]},
        {"tool_responses": ["x"]},
        {"available_tools": [{"name": "f"}]},
        {"rejected_conversations": [{"from": "gpt", "value": "x"}]},
        {"chosen_response": "x"},
    ],
)
def test_other_spellings_of_what_changes_the_meaning_are_refused(more: dict[str, Any]) -> None:
    assert kind_of({"conversations": TALK, **more}) == "unsupported_key"
    assert kind_of({"conversations": [TALK[0], {**TALK[1], **more}]}) == "unsupported_key"
    assert kind_of({"conversations": [{**TALK[0], "system": "Be brief."}, TALK[1]]}) == "unsupported_key"


@pytest.mark.parametrize(
    "value", [b"RIFF\0\0\0\0WAVEfmt ", b"\0\0\0\x20ftypisom", b"OggS\0", b"\x1aE\xdf\xa3", b"ID3\4"]
)
def test_bytes_of_videos_and_sounds_are_refused(value: bytes) -> None:
    for stated in (value, pa.py_buffer(value), {"bytes": value, "path": None}):
        assert kind_of({"speech": stated, "conversations": TALK}) == "video_or_sound"
        assert kind_of({"image": stated, "conversations": SHOWN}) == "video_or_sound"


@pytest.mark.parametrize("nothing", [None, float("nan"), ""])
def test_a_picture_without_bytes_is_read_by_its_path(nothing: Any) -> None:
    stated = {"image": {"bytes": nothing, "path": "a.png"}, "conversations": SHOWN}
    assert parse(stated) == parse({"image": "a.png", "conversations": SHOWN})


@pytest.mark.parametrize(
    "image",
    [{"<image_00>": "a.png", "<image_01>": "b.png"}, [["a.png", "b.png"]], [[[1, 2, 3]], [[4, 5, 6]]], "['a.png']"],
)
def test_what_holds_several_pictures_is_named_and_not_counted(image: Any) -> None:
    assert kind_of({"image": image, "conversations": TALK}) == "image_value" or isinstance(image, str)
    assert kind_of({"image": image, "conversations": SHOWN}) == "image_value"
