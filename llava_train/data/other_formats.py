"""What to do about a file of samples that is neither JSON, JSONL, Parquet nor Arrow."""

from __future__ import annotations

from pathlib import Path

from llava_train.file_kinds import FileKind, kind_of_content

_WANTED = "wanted a JSON list of records, or JSONL with one JSON object a line"
_UNPACKED_BY = {"a bzip2 file": "bunzip2", "an xz file": "unxz", "a Zstandard file": "unzstd"}
_ARCHIVES = ("a TAR archive", "a ZIP archive", "a damaged ZIP archive")


def not_records(path: Path, head: bytes) -> str:
    """Return the message about a file whose first bytes begin no JSON: what it is, and how to convert it."""
    kind = kind_of_content(head, Path(path.name.removesuffix(".gz")) if path.suffix == ".gz" else path)
    if kind is None:
        return f"{path}: begins with {head[:8]!r}; {_WANTED}"
    return f"{path}: this is {kind.words}; {_WANTED}{_advice(kind, path)}"


def _advice(kind: FileKind, path: Path) -> str:
    target, words = f"{path.with_suffix('.jsonl')}", kind.words
    if kind.is_picture or words in _ARCHIVES:
        return ". `path:` names the file of samples; the folder or archive of its pictures stands under `images:`"
    if words.endswith("in UTF-16"):
        return f". Convert it: iconv -f UTF-16 -t UTF-8 {path} > FILE"
    if words in _UNPACKED_BY:
        return f". Unpack it ({_UNPACKED_BY[words]} {path}); gzip is read as it is"
    if words.startswith("a Git LFS"):
        return ". Get the file itself: git lfs pull"
    if words.startswith("an HTML"):
        return ". Download the file again"
    if words == "a stage file":
        return ". A stage file is named with --config; `path:` is the data that it trains on"
    if code := _conversion(kind, str(path), target):
        return f'. Convert it: python -c "{code}". Its columns become the keys of the records'
    return ". Convert it"


def _conversion(kind: FileKind, path: str, target: str) -> str:
    """Return the Python that writes a table as JSONL."""
    if kind.delimiter:
        separator = "" if kind.delimiter == "," else f", sep={kind.delimiter!r}"
        return f"import datasets; datasets.Dataset.from_csv({path!r}{separator}).to_json({target!r})"
    if kind.words == "a YAML file":
        target = f"{Path(path).with_suffix('.json')}"
        return f"import json, yaml; json.dump(yaml.safe_load(open({path!r})), open({target!r}, 'w'))"
    if kind.words == "an Excel file":
        return f"import pandas; pandas.read_excel({path!r}).to_json({target!r}, orient='records', lines=True)"
    return ""
