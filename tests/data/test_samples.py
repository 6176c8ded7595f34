from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_train.data.samples import DataError, LlavaJson, Mixture, Sample, SampleError, Turn, parse_record

ROOT = Path("images")
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat "}]


def parse(**changes) -> Sample:
    return parse_record({"id": "a", "image": "b/c.jpg", "conversations": TURNS, **changes}, ROOT, "0")


def test_a_record_becomes_a_sample() -> None:
    assert parse(model="") == Sample(
        "a", (ROOT / "b/c.jpg",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat"))
    )


def test_a_system_turn_several_images_and_no_image_are_understood() -> None:
    system = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hi"},
    ]
    assert parse(conversations=system, image=[]).turns[0] == Turn("system", "Be brief.")
    two = [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "B"}]
    assert parse(conversations=two, image=["a.png", "b.png"]).images == (ROOT / "a.png", ROOT / "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversations": []}, '"conversations" is missing, empty or not a list'),
        ({"conversations": [{"from": "human"}]}, "turn 1: a turn is"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: a turn is"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "turn 1: unknown role 'bot'; known: human, user, gpt"),
        ({"conversations": None}, '"conversations" is missing, empty or not a list'),
        ({"conversations": {"from": "human"}}, '"conversations" is missing, empty or not a list'),
        ({"conversations": ["hello"]}, "turn 1: a turn is"),
        ({"conversations": [TURNS[0], {"from": None, "value": "x"}]}, "turn 2: unknown role None; known: human"),
        ({"conversations": [{"from": [], "value": "x"}]}, "turn 1: unknown role []; known: human"),
        ({"conversations": [{"from": "human", "value": "half \ud83d"}]}, "turn 1: the text holds half of a character"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "roles out of order: ; wanted user"),
        ({"conversations": [*TURNS, {"from": "system", "value": "x"}, TURNS[1]]}, "roles out of order: user, assistant, system,"),
        ({"conversations": TURNS[::-1]}, "roles out of order: assistant, user; wanted user, assistant"),
        ({"conversations": TURNS[:1]}, "roles out of order: user;"),
        ({"image": None}, "1 <image> placeholders, but 0 images"),
        ({"image": ["a.png", "b.png"]}, "1 <image> placeholders, but 2 images"),
        ({"image": "../secret.png"}, "image path '../secret.png' leaves the image folder"),
        ({"image": "/etc/passwd"}, "image path '/etc/passwd' leaves the image folder"),
        ({"image": "a/../../secret.png"}, "leaves the image folder"),
        ({"image": 3}, '"image" is a relative path or a list of them, not 3'),
        ({"image": {"a.png": 1}}, '"image" is a relative path or a list of them, not {'),
        ({"image": [""]}, "\"image\" is a relative path or a list of them, not ''"),
        ({"image": [3]}, '"image" is a relative path or a list of them, not 3'),
        ({"conversations": [TURNS[0], {"from": "gpt", "value": "see <image>"}]}, "<image> outside a user turn"),
        ({"conversations": [{"from": "system", "value": "<image>"}, *TURNS]}, "<image> outside a user turn"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_conversation_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("record", [3, [], "x"])
def test_a_record_that_is_no_object_is_refused(record) -> None:
    with pytest.raises(SampleError, match="a record is a JSON object"):
        parse_record(record, ROOT, "0")


@pytest.mark.parametrize("as_lines", [True, False])
def test_json_and_jsonl_are_told_by_their_content(as_lines: bool, tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": "x.png", "conversations": TURNS} for i in range(3)]
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n" if as_lines else json.dumps(rows, indent=1))
    source = LlavaJson(path)
    assert [source[i].id for i in range(len(source))] == ["0", "1", "2"]
    assert source[0].images == (tmp_path / "x.png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sample"),
        (b"[]", "holds no sample"),
        (b'[{"id": 1},', "not valid JSON"),
        (b'{"id": 1}\n{"id":', "not valid JSON"),
        (b'{"id": 1}\n[2]', "record 2 is not a JSON object"),
        (b"hello", "record 1 is not a JSON object; wanted a JSON list or JSONL"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_data_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        LlavaJson(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("as_lines", [True, False])
@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\x7f\u2029b", "Ünïcode 北京 👍🏽"])
def test_a_text_comes_back_as_it_was_whatever_separators_it_holds(text: str, as_lines: bool, tmp_path: Path) -> None:
    row = {"id": text, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    rows = [json.dumps(row, ensure_ascii=False)] * 2
    path = tmp_path / "data.json"
    path.write_text("\r\n".join(rows) if as_lines else f"[{', '.join(rows)}]", encoding="utf-8")
    source = LlavaJson(path)
    assert [turn.text for turn in source[1].turns] == [text, text]
    assert (len(source), source[0].id, source.record_id(0)) == (2, text, text)


@pytest.mark.parametrize("template", ["{row}\n{row}", "[{row}, {row}]"])
def test_half_a_character_spoils_its_own_record_alone(template: str, tmp_path: Path) -> None:
    good = json.dumps({"id": "good", "image": "x.png", "conversations": TURNS})
    bad = good.replace("What", "\\ud83d").replace("good", "bad")
    path = tmp_path / "data.json"
    path.write_text(template.replace("{row}", bad, 1).replace("{row}", good))
    source = LlavaJson(path)
    assert (source.record_id(0), source[1].id) == ("bad", "good")
    with pytest.raises(SampleError, match="turn 1: the text holds half of a character"):
        source[0]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"id": "a", "image": "x.png", "conversations": TURNS}]).encode())
    assert LlavaJson(path)[0].id == "a"


def test_a_record_without_an_id_is_known_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": "x.png", "conversations": TURNS}, 3]))
    source = LlavaJson(path)
    assert (source[0].id, source.record_id(0), source.record_id(1)) == ("0", "0", "1")


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(DataError, match="nowhere.json: cannot read the data file: No such file"):
        LlavaJson("nowhere.json")


def test_a_mixture_counts_its_sources_end_to_end(tmp_path: Path) -> None:
    sources = []
    for name, n in (("a", 2), ("b", 3)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"id": f"{name}{i}", "image": "x", "conversations": TURNS} for i in range(n)]))
        sources.append(LlavaJson(path))
    mixture = Mixture(sources)
    assert [mixture[i].id for i in range(len(mixture))] == ["a0", "a1", "b0", "b1", "b2"]
    assert mixture.locate(3) == (sources[1], 1)
    with pytest.raises(IndexError):
        mixture.locate(5)
