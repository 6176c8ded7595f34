from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data import records
from llava_train.data.problems import DataError, SampleError
from llava_train.data.records import JsonRecords

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " A cat "}]
ROW = {"id": "a", "image": "x.png", "conversations": TURNS}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "in memory"])
@pytest.mark.parametrize("zipped", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("as_lines", [True, False], ids=["lines", "list"])
def test_lists_and_lines_are_told_by_their_content(as_lines: bool, zipped: bool, kept: bool, tmp_path: Path) -> None:
    rows = [{**ROW, "id": str(i)} for i in range(3)]
    text = "\n\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1)
    content = gzip.compress(text.encode(), mtime=0) if zipped else text
    found = JsonRecords(write(tmp_path / "data", content), tmp_path / "cache" if kept else None)
    assert [found[i] for i in range(len(found))] == rows
    lines = text.split("\n")
    begins = "{" if as_lines else " {"
    assert [found.line(i) for i in range(3)] == [n for n, line in enumerate(lines, 1) if line.startswith(begins)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(VALUES, min_size=1, max_size=8),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    ascii=st.booleans(),
)
def test_any_list_is_cut_into_its_values_whatever_the_chunks(rows, chunk, indent, ascii, tmp_path_factory) -> None:  # fmt: skip
    path = write(tmp_path_factory.mktemp("rows") / "x.json", json.dumps(rows, indent=indent, ensure_ascii=ascii))
    default, records._CHUNK = records._CHUNK, chunk
    try:
        found = JsonRecords(path)
    finally:
        records._CHUNK = default
    assert [found[i] for i in range(len(found))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no sample"),
        (" \n", "holds no sample"),
        ("[]", "holds no sample"),
        (
            '[{"id": 1},',
            "not valid JSON: Expecting value .line 1, column 12, in record 2, after record 1 with the id '1'.",
        ),
        ('[{"id": 1}', "not valid JSON: the list has no end, as in a cut-off copy .line 1, column 11, after record 1"),
        ('[{"id": 1}\n {"id": 2}]', "not valid JSON: wanted ',', found '{' .line 2, column 2, after record 1"),
        ('[{"id": 1}]\n[]', "something follows the end of the list .line 2, column 1, after record 1"),
        (
            '[\n{"id": 1},\n{"id": nought}]' + " " * 99,
            "not valid JSON: Expecting value .line 3, column 8, in record 2, after record 1 with the id '1'.*nought",
        ),
        ('[1, "a" "b"]', "wanted ',', found '\"' .line 1, column 9, after record 2., at"),
        ('[{"id": "1}]', "not valid JSON: Unterminated string"),
        ('{\n"id": 1}', "line 1 is not valid JSON"),
        ('{"id": "1}\n{"id": "2"}\n', "line 1 is not valid JSON"),
        ("hello", "this is a text; wanted a JSON list of records, or JSONL"),
        (b"\xff\xfe", "begins with b'.xff.xfe'; wanted"),
        ('[{"id": 1}]'.encode("utf-16"), "a JSON file in UTF-16; .*iconv -f UTF-16 -t UTF-8"),
        (b"\xfe\xff" + '{"id": 1}'.encode("utf-16-be"), "a JSON file in UTF-16; .*iconv -f UTF-16 -t UTF-8"),
        ("id,text\n1,a\n".encode("utf-16"), "in UTF-16; .*onvert"),
        ('[{"id": 1}]'.encode("utf-32"), "text in UTF-32, not in UTF-8; convert it: iconv -f UTF-32 -t UTF-8"),
        (b"\0\0\xfe\xff" + '[{"id": 1}]'.encode("utf-32-be"), "text in UTF-32"),
        ('[{"id": 1}]'.encode("utf-16-le"), "text in UTF-16, not in UTF-8; convert it: iconv -f UTF-16LE"),
        ('\n{"id": 1}'.encode("utf-32-be"), "text in UTF-32, not in UTF-8; convert it: iconv -f UTF-32BE"),
        (gzip.compress('[{"id": 1}]'.encode("utf-16"), mtime=0), "a JSON file in UTF-16"),
        (LFS_POINTER, "a Git LFS pointer, which stands for a file that was not fetched: run `git lfs install`"),
        (LFS_POINTER.replace("git-lfs.github", "hawser.github"), "a Git LFS pointer"),
        (b"\x1f\x8b1234567890", "the gzip file is damaged"),
        (gzip.compress(b"[1, 2]" * 99, mtime=0)[:30], "the gzip file is damaged"),
    ],
)
def test_a_file_that_is_no_data_file_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", content)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match=message) as caught:
            JsonRecords(path, cache)
        assert str(path) in str(caught.value)
    assert not list(tmp_path.glob("cache/*.tmp"))


@pytest.mark.parametrize("chunk", [1, 7, 100, 4 << 20])
def test_a_break_in_a_file_of_one_line_is_told_by_its_column_and_records(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    text = json.dumps([{"id": 1000 + i, "text": "北京" * i} for i in range(40)], ensure_ascii=False)
    broken = text.replace('"id": 1031,', '"id": 1031')
    column = broken.index('"id": 1031') + len('"id": 1031') + 2
    with pytest.raises(DataError) as caught:
        JsonRecords(write(tmp_path / "data.json", broken))
    assert f"(line 1, column {column:,}, in record 32, after record 31 with the id '1030'), at '" in str(caught.value)
    assert '"id": 1031 "text"' in str(caught.value)


@pytest.mark.parametrize("as_lines", [True, False])
@pytest.mark.parametrize("text", ["a\u2028b", "a\u0085b", "a\x7f\u2029b", "Ünïcode 北京 👍🏽"])
def test_a_text_comes_back_as_it_was_whatever_separators_it_holds(text: str, as_lines: bool, tmp_path: Path) -> None:
    rows = [json.dumps({"id": text}, ensure_ascii=False)] * 2
    content = "\r\n".join(rows) if as_lines else f"[{', '.join(rows)}]"
    found = JsonRecords(write(tmp_path / "data.json", content))
    assert [found[i] for i in range(len(found))] == [{"id": text}] * 2


LINES, LIST = "{row}\n{row}", "[{row}, {row}]"


@pytest.mark.parametrize(
    ("template", "bad", "kind"),
    [
        (LINES, b"\xff", "not_utf8"),
        (LIST, b"\xff", "not_utf8"),
        (LIST, b"caf\xe9", "not_utf8"),
        (LINES, b'"', "not_json"),
    ],
)
def test_a_damaged_record_spoils_itself_alone(template: str, bad: bytes, kind: str, tmp_path: Path) -> None:
    good = json.dumps(ROW).encode()
    content = template.encode().replace(b"{row}", good, 1).replace(b"{row}", good.replace(b"What", b"What" + bad))
    found = JsonRecords(write(tmp_path / "data.json", content))
    assert found[0] == ROW
    with pytest.raises(SampleError) as caught:
        found[1]
    assert caught.value.kind == kind


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    for content in (json.dumps([ROW]), json.dumps(ROW)):
        assert JsonRecords(write(tmp_path / "data.json", b"\xef\xbb\xbf" + content.encode()))[0] == ROW


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "data.json", json.dumps([{"id": 1}])), tmp_path / "cache"
    assert JsonRecords(path, cache)[0] == {"id": 1}
    write(path, json.dumps([{"id": 2}]))
    assert JsonRecords(path, cache)[0] == {"id": 2}
    monkeypatch.setattr(records, "_cut", lambda path: pytest.fail("read again"))
    assert JsonRecords(path, cache)[0] == {"id": 2}


def test_a_file_of_many_chunks_comes_back_in_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"id": i, "text": "x" * rng.randrange(3000)} for i in range(6000)]
    found = JsonRecords(write(tmp_path / "data.json", json.dumps(rows)), tmp_path / "cache")
    assert all(found[i] == row for i, row in enumerate(rows))


def test_a_number_too_long_for_python_spoils_its_own_record_alone(tmp_path: Path) -> None:
    found = JsonRecords(write(tmp_path / "data.json", '[{"id": 1}, {"id": ' + "1" * 5000 + "}]"))
    assert found[0] == {"id": 1}
    with pytest.raises(SampleError) as caught:
        found[1]
    assert caught.value.kind == "not_json"


@pytest.mark.parametrize("torn", [b"", b"ARROW1 and no more"])
def test_a_torn_table_is_built_again(torn: bytes, tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.json", json.dumps([ROW])), tmp_path / "cache"
    assert JsonRecords(path, cache)[0] == ROW
    [table] = cache.glob("*-records-*.arrow")
    table.write_bytes(torn)
    assert JsonRecords(path, cache)[0] == ROW


def test_the_checksum_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "data.json", json.dumps([ROW])), tmp_path / "cache"
    first = JsonRecords(path, cache).fingerprint()
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(records, "sha256", lambda path: pytest.fail("read again"))
    assert JsonRecords(path, cache).fingerprint() == first


def test_processes_that_open_a_file_at_once_read_the_same(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "data.json", json.dumps([{"id": i} for i in range(20_000)])), tmp_path / "cache"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_last_record, [(path, cache)] * 4, chunksize=1)
    assert found == [{"id": 19_999}] * 4
    assert len(list(cache.glob("*.arrow"))) == 1


def _last_record(path: Path, cache: Path) -> dict:
    found = JsonRecords(path, cache)
    return found[len(found) - 1]


@pytest.mark.parametrize("as_lines", [True, False])
def test_a_key_that_stands_twice_with_different_values_spoils_its_record(as_lines: bool, tmp_path: Path) -> None:
    record = '{"id": 0, "image": "a.png", "turn": {"loss": true, "loss": %s}, "image": "%s"}'
    lines = [record % ("true", "a.png"), record % ("true", "b.png"), record % ("false", "a.png")]
    found = JsonRecords(write(tmp_path / "data", "\n".join(lines) if as_lines else f"[{','.join(lines)}]"))
    assert found[0] == {"id": 0, "image": "a.png", "turn": {"loss": True}}
    for index, key in ((1, "image"), (2, "loss")):
        with pytest.raises(SampleError, match=f'the key "{key}" stands twice') as caught:
            found[index]
        assert caught.value.kind == "not_json"
