"""What a source is, is told from its content; each shape and store gives the same samples."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
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
        ("data/scenes/no-such.json", "`python data/draw_scenes.py` draws those of configs/small"),
        ("file:///data/a%20b.json", "this is an address; write the path alone: /data/a b.json"),
        ("file://localhost/data/a.json", "write the path alone: /data/a.json"),
        ("FILE:/data/a.json", "write the path alone: /data/a.json"),
        ("s3://bucket/a.json", "only files of this machine are read; copy it here .aws s3 cp --recursive."),
        ("gs://bucket/shards", "only files of this machine are read; copy it here .gcloud storage cp -r."),
        ("https://example.org/a.json", "only files of this machine are read; copy it here .wget."),
        ("abfss://box@account/a.json", "only files of this machine are read; copy it here and write its path"),
        ("https://huggingface.co/datasets/owner/name", "name a data set of the hub by its id: owner/name"),
        ("hf://datasets/owner/name", "name a data set of the hub by its id: owner/name"),
        ("C:\\data\\a.json", "this is a path of Windows"),
        ("D:/data/a.json", "this is a path of Windows"),
        ("\\\\server\\share\\a.json", "this is a path of Windows"),
        ("shards/*.parquet", "patterns are not expanded .and nothing matches"),
        ("shards/[ab].json", "patterns are not expanded"),
        (
            "my%20data/a.json",
            "it is percent-encoded, as addresses are; write the characters themselves: my data/a.json",
        ),
        ("x" * 5000, "cannot read the data file: File name too long"),
    ],
)
def test_a_missing_file_is_refused(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(name)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("file:///nowhere/pictures", "write the path alone: /nowhere/pictures"),
        ("s3://bucket/pictures", "only files of this machine are read"),
        ("pictures/*", "patterns are not expanded"),
        ("C:\\pictures", "this is a path of Windows"),
        ("my%20pictures", "write the characters themselves: my pictures"),
        ({"coco": "gs://bucket/coco"}, "gs://bucket/coco: .*only files of this machine are read"),
    ],
)
def test_images_that_are_no_path_are_refused_with_what_to_write(stated: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[{}]")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data.json", stated)


def test_a_path_that_exists_in_another_spelling_is_named(tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    for name in ("a.json", "b*.json", "a%20b.json"):
        (tmp_path / "my data" / name).write_text('[{"id": "x"}]')
        assert len(open_source(tmp_path / "my data" / name)) == 1, "a name that looks like another thing is a name"
    for stated in (f"{tmp_path}/my%20data/a.json", f"{tmp_path}\\my data\\a.json".replace("\\", "\\")):
        with pytest.raises(DataError, match=f"write {tmp_path}/my data/a.json"):
            open_source(stated)
    with pytest.raises(DataError, match=rf"patterns are not expanded .this one matches {tmp_path}/my data/a.json"):
        open_source(f"{tmp_path}/my data/a*.json")


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


@pytest.mark.parametrize("kept", ["folder", "file"])
@pytest.mark.parametrize("cached", [True, False])
def test_parquet_is_copied_to_the_cache_and_never_to_the_home_folder(
    kept: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME"):
        monkeypatch.setattr(datasets.config, name, Path("/proc/no/such/home"))
    (tmp_path / "shards").mkdir()
    (tmp_path / "tmp").mkdir()
    for number in range(3):
        rows_of("llava", True).select([number]).to_parquet(tmp_path / f"shards/{number}.parquet")
    path, cache = tmp_path / "shards", tmp_path / "cache"
    source = open_source(path / "0.parquet" if kept == "file" else path, cache=cache if cached else None)
    assert read(source) == EXPECTED[: len(source)]
    assert len(source) == (1 if kept == "file" else 3)
    assert bool(list(cache.rglob("*.arrow"))) == cached
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_folder_is_read_where_there_is_no_home_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    rows_of("llava", True).to_parquet(tmp_path / "shards/0.parquet")
    code = "from llava_train.data.sources import open_source as o; print(len(o('shards', cache=__import__('pathlib').Path('c'))))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    command = [sys.executable, "-c", code]
    place = {
        "cwd": tmp_path,
        "env": {**environment, "HOME": "/proc/none", "PYTHONPATH": str(Path(__file__).parents[2])},
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, **place)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize("kept", ["shards", "saved"])
def test_a_folder_whose_files_git_lfs_has_not_fetched_is_refused(kept: str, tmp_path: Path) -> None:
    rows, folder = rows_of("llava", True), tmp_path / "data"
    if kept == "saved":
        rows.save_to_disk(folder)
    else:
        (folder / "train").mkdir(parents=True)
        rows.to_parquet(folder / "train/0.parquet")
    for file in [*folder.rglob("*.arrow"), *folder.rglob("*.parquet")]:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(DataError, match=r"data/.* is a Git LFS pointer.*git lfs pull"):
        open_source(folder, cache=tmp_path / "cache")


def test_values_that_python_cannot_hold_spoil_no_sample(tmp_path: Path) -> None:
    conversation = pa.array([SHAPES["llava"]["conversations"][0]])
    not_utf8 = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa"))
    table = pa.table(
        {
            "image": pa.array([PICTURES[0]["bytes"]]),
            "conversations": conversation,
            "far": pa.array([2**62], pa.timestamp("s")),
            "note": not_utf8,
        }
    )
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    source = open_source(tmp_path / "x.arrow")
    assert read(source)[0][1] == EXPECTED[0][1]
    record = source.records[0]
    assert record["far"] == "timestamp[s] out of range"
    assert record["note"] == "\udcffa"


def test_arrows_file_format_is_read(tmp_path: Path) -> None:
    table = pa.table({"conversations": pa.array([SHAPES["llava"]["conversations"][0]]), "image": ["a.png"]})
    path = tmp_path / "x.feather"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    source = open_source(path)
    assert source.records[0]["image"] == "a.png"
    assert source.fingerprint() == open_source(path).fingerprint()
    os.utime(path, (0, 0))
    assert source.fingerprint() != open_source(path).fingerprint()


def test_a_table_without_rows_and_one_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    conversations = pa.array([SHAPES["llava"]["conversations"][0]])
    names = ["image", "image", "conversations"]
    twice = pa.Table.from_arrays([pa.array(["a.png"]), pa.array(["b.png"]), conversations], names=names)
    pq.write_table(twice.slice(0, 0), tmp_path / "empty")
    pq.write_table(twice, tmp_path / "twice")
    for name, message in (("empty", "holds no sample"), ("twice", "Multiple matches for .*image")):
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            open_source(tmp_path / name, cache=tmp_path / "cache")


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
