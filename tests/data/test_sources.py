"""What a source is, is told from its content; each shape and store gives the same samples."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import multiprocessing
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from llava_train.data.images import decode_image
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.problems import DataError
from llava_train.data.sources import Source, open_source

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def encoded(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [{"bytes": encoded(colour), "path": None} for colour in COLOURS]
SHAPES: dict[str, dict[str, list[Any]]] = {
    "llava": {
        "id": ["0", "1", "2"],
        "image": PICTURES,
        "conversations": [
            [{"from": "human", "value": f"<image>\nWhich {i}?"}, {"from": "gpt", "value": f"It is {i}."}] for i in range(3)
        ],
    },
    "cauldron": {
        "images": [[picture] for picture in PICTURES],
        "texts": [[{"user": f"Which {i}?", "assistant": f"It is {i}.", "source": "x"}] for i in range(3)],
    },
    "messages": {
        "images": [[picture] for picture in PICTURES],
        "messages": [
            [{"role": "user", "content": f"Which {i}?"}, {"role": "assistant", "content": f"It is {i}."}] for i in range(3)
        ],
    },
    "typed messages": {
        "images": [[picture] for picture in PICTURES],
        "messages": [
            [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"Which {i}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"It is {i}."}]},
            ]
            for i in range(3)
        ],
    },
}  # fmt: skip


def rows_of(shape: str, with_features: bool) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict(SHAPES[shape])
    if not with_features:
        return rows
    image = datasets.Image()
    column, feature = ("image", image) if shape == "llava" else ("images", datasets.List(image))
    return rows.cast_column(column, feature)


EXPECTED = [(str(i), [f"<image>\nWhich {i}?", f"It is {i}."], [colour], None) for i, colour in enumerate(COLOURS)]


def read(source: Source) -> list[Any]:
    """Id, texts, colours of the images and line of each sample."""
    samples = [source[i] for i in range(len(source))]
    colours = [[decode_image(picture).getpixel((3, 3)) for picture in sample.images] for sample in samples]
    return [
        (sample.id, [turn.text for turn in sample.turns], seen, source.line(i))
        for i, (sample, seen) in enumerate(zip(samples, colours, strict=True))
    ]


@pytest.mark.parametrize("with_features", [True, False], ids=["image features", "plain structs"])
@pytest.mark.parametrize("kept", ["parquet", "saved", "arrow", "folder"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_from_every_kind_of_data_set(
    shape: str, kept: str, with_features: bool, tmp_path: Path
) -> None:
    rows, path = rows_of(shape, with_features), tmp_path / "odd.name"
    if kept == "parquet":
        rows.to_parquet(path)
    elif kept == "folder":
        path.mkdir()
        rows.to_parquet(path / "train-00000-of-00001.parquet")
    else:
        rows.save_to_disk(tmp_path / "saved" if kept == "arrow" else path)
        if kept == "arrow":
            path = next((tmp_path / "saved").glob("*.arrow"))
    source = open_source(path, cache=tmp_path / "cache")
    assert read(source) == EXPECTED
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(read, [source]) == EXPECTED


def test_a_split_of_a_saved_dictionary_is_taken(tmp_path: Path) -> None:
    rows = rows_of("llava", True)
    datasets.DatasetDict(train=rows.select([0]), test=rows).save_to_disk(tmp_path / "both")
    assert len(open_source(tmp_path / "both")) == 1
    assert read(open_source(tmp_path / "both", split="test")) == EXPECTED
    with pytest.raises(DataError, match=r"no split 'validation'; set `split:` to one of train, test"):
        open_source(tmp_path / "both", split="validation")


def test_a_row_may_name_its_picture_instead(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(encoded(COLOURS[1]))
    conversation = SHAPES["llava"]["conversations"][1]
    datasets.Dataset.from_list([{"image": "1.png", "conversations": conversation}]).to_parquet(tmp_path / "x")
    (picture,) = open_source(tmp_path / "x", tmp_path / "images", cache=tmp_path / "cache")[0].images
    assert decode_image(picture).getpixel((3, 3)) == COLOURS[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.json", "nowhere.json: cannot read the data file: No such file"),
        ("no/such.json", "no/such.json: cannot read the data file: No such file"),
    ],
)
def test_a_missing_file_is_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(name)


def test_a_hub_data_set_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(DataError, match="somebody/some-data: the data set cannot be loaded: no network.* no such file"):
        open_source("somebody/some-data")


def test_a_hub_data_set_is_loaded_by_id_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **settings: Any) -> datasets.Dataset:
        asked.append((arguments, settings))
        return rows_of("cauldron", True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("HuggingFaceM4/the_cauldron", subset="ai2d", split="validation")
    assert read(source) == EXPECTED
    assert asked == [(("HuggingFaceM4/the_cauldron", "ai2d"), {"split": "validation"})]
    assert source.name == "the_cauldron"


def test_a_hub_id_may_hold_dots_and_a_file_has_no_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows_of("llava", True))
    assert read(open_source("lmms-lab/LLaVA-OneVision-1.5-Instruct-Data")) == EXPECTED
    (tmp_path / "x.json").write_text("[{}]")
    with pytest.raises(DataError, match="a file has no `subset:` or `split:`"):
        open_source(tmp_path / "x.json", split="train")


def test_of_an_embedded_picture_nothing_is_read_before_it_is_opened(tmp_path: Path) -> None:
    rows_of("cauldron", True).to_parquet(tmp_path / "x")
    (picture,) = open_source(tmp_path / "x", cache=tmp_path / "cache")[0].images
    assert isinstance(picture, EmbeddedPicture)
    assert isinstance(picture.content, pa.Buffer)
    assert picture.open("rb").read() == PICTURES[0]["bytes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "a damaged ZIP archive; wanted a JSON list .*`path:` names the file of samples"),
        (b"PAR1 but no more", "cannot be loaded"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "x", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a b.csv", b"id,conversations\n1,x\n2,y\n", "this is a CSV table"),
        ("a.tsv", b"id\tconversations\n1\tx\n2\ty\n", "this is a TSV table"),
        ("a.csv", b"id;conversations\n1;x\n2;y\n", "this is a CSV table"),
        ("a.yaml", b"- {id: 1, conversations: x}\n- {id: 2, conversations: y}\n", "this is a YAML file"),
    ],
)
def test_a_table_is_named_with_a_conversion_that_works(
    name: str, content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {words}; wanted a JSON list .* Convert it: python -c ") as caught:
        open_source(name)
    exec(re.search('python -c "(.*)". Its columns', str(caught.value))[1])
    (converted,) = (path for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl"))
    records = open_source(converted).records
    assert [(record["id"], record["conversations"]) for record in (records[0], records[1])] == [(1, "x"), (2, "y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv.gz", gzip.compress(b"id,text\n1,x\n2,y\n", mtime=0), "a.csv.gz: this is a CSV table"),
        ("a.json", json.dumps([{"id": 1}]).encode("utf-16"), "a JSON file in UTF-16; .* iconv -f UTF-16 -t UTF-8"),
        ("a.json", b"<!doctype html><html></html>", "an HTML page, .* Download the file again"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9", "a Git LFS pointer, .*git lfs"),
        ("a.json.xz", lzma.compress(b"[]"), r"an xz file; .* Unpack it \(unxz .*a.json.xz\)"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "a PNG picture; .* `path:` names the file of samples"),
        ("a.yaml", b"name: a\nmodel: {}\ntrainable: {}\ndata: []\n", "a stage file; .* named with --config"),
        ("a.json", b'"text"', "a JSON file; wanted a JSON list of records"),
    ],
)
def test_a_file_of_another_format_is_named_with_what_to_do(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)


def test_records_without_an_id_or_that_are_none_are_known_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"x": 1}\n\n{"id": "b"}\n{"id": 3}\n{nonsense\n')
    source = open_source(path)
    assert [source.record_id(i) for i in range(4)] == ["0", "b", "3", "3"]
    assert [source.line(i) for i in range(4)] == [1, 3, 4, 5]


def test_pictures_lie_beside_the_file_where_nothing_else_is_said(tmp_path: Path) -> None:
    row = {"image": "a.png", "conversations": SHAPES["llava"]["conversations"][0]}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    assert [str(picture) for picture in open_source(tmp_path / "data.json")[0].images] == [str(tmp_path / "a.png")]
