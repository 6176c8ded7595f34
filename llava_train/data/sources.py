"""One source of samples: its records, and its pictures. What it is is told from its content.

a file     JSON list or JSONL, plain or gzipped; Parquet; Arrow
a folder   what `datasets` saved (`save_to_disk`), or whatever `datasets.load_dataset` reads
owner/name a data set of the Hugging Face hub, where there is no such file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from llava_train.data.archives import PictureArchive
from llava_train.data.formats import parse_record, record_id
from llava_train.data.other_formats import not_records
from llava_train.data.pictures import PictureFolder, Pictures, PictureStore, PrefixedStores
from llava_train.data.problems import DataError, SampleError
from llava_train.data.records import GZIP_MAGIC, JsonRecords
from llava_train.data.samples import Sample
from llava_train.failures import explain
from llava_train.failures.words import Context
from llava_train.files import is_hub_id

if TYPE_CHECKING:
    import datasets

_SUFFIXES_OF_FILES = (".json", ".jsonl", ".gz", ".parquet", ".arrow", ".zip", ".tar")
"""What misses such a file must not be told of the hub."""
_BINARY_MAGIC = {b"PAR1": "parquet", b"ARRO": "arrow", b"\xff\xff\xff\xff": "arrow"}


class Records(Protocol):
    """Records by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The record as Python objects. Raises SampleError."""

    def line(self, index: int) -> int | None:
        """The line of its file that the record begins in, counted from 1, if it has one."""

    def fingerprint(self) -> str:
        """Another one where the content is another."""


class HubRecords:
    """The rows of a Hugging Face data set, pictures as bytes."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows.with_format("arrow")  # pictures stay bytes: they are decoded by us, where they are needed
        self._fingerprint = rows._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        row = self._rows[index]
        return {name: _as_python(row[name][0]) for name in row.column_names}

    def line(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return str(self._fingerprint)


def _as_python(value: pa.Scalar) -> Any:
    """An Arrow value as Python objects, binary ones as buffers: of an embedded picture nothing is read yet."""
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar) or not value.is_valid:
        return value.as_py()
    if isinstance(value, pa.BinaryScalar | pa.LargeBinaryScalar):
        return value.as_buffer()
    if isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return [_as_python(inner) for inner in value.values]
    if isinstance(value, pa.StructScalar):
        return {name: _as_python(inner) for name, inner in value.items()}
    return value.as_py()


class Source:
    """The samples of one source, by index.

    Args:
        path: as the stage file has it.
        name: what metrics and reports call it.
    """

    def __init__(self, path: str, name: str, records: Records, pictures: Pictures) -> None:
        self.path, self.name, self.records, self.pictures = path, name, records, pictures

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Parses and validates a sample. Raises SampleError."""
        return self.parse(self.records[index], index)

    def parse(self, record: Any, index: int) -> Sample:
        """The sample of `records[index]`. Raises SampleError."""
        return parse_record(record, self.pictures, default_id=str(index))

    def record_id(self, index: int) -> str:
        """The id that the record states, valid or not."""
        try:
            return record_id(self.records[index], str(index))
        except SampleError:
            return str(index)

    def line(self, index: int) -> int | None:
        """The line of the file that the sample begins in, counted from 1, if it has one."""
        return self.records.line(index)

    def fingerprint(self) -> str:
        """Another one where the records are others."""
        return self.records.fingerprint()


def open_source(
    path: str | Path,
    images: str | Path | Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    cache: Path | None = None,
) -> Source:
    """Opens a source.

    Args:
        path: file, folder, or hub id.
        images: folder or archive that the image paths are relative to, or such by prefix of the paths; default:
            the folder of `path`.
        subset, split: of a Hugging Face data set; the default split is `train`.
        cache: folder for what is built once; None keeps it in memory.

    Raises:
        DataError: the source or its images cannot be read.
    """
    records = _open_records(Path(path), subset, split, cache)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return Source(str(path), name or Path(path).name.split(".")[0], records, _open_pictures(images, folder, cache))


def _open_records(path: Path, subset: str | None, split: str | None, cache: Path | None) -> Records:
    try:
        kind = _kind_of_file(path) if path.is_file() else None
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if kind and (subset or split):
        raise DataError(f"{path}: a file has no `subset:` or `split:`; remove the key, or name a data set")
    if kind == "json":
        return JsonRecords(path, cache)
    import datasets  # an eighth of all that a start imports, and JSON does not need it
    from datasets.exceptions import DatasetsError

    split = split or "train"
    try:
        if kind == "parquet":
            return HubRecords(datasets.Dataset.from_parquet(str(path), cache_dir=str(cache) if cache else None))
        if kind == "arrow":
            return HubRecords(datasets.Dataset.from_file(str(path)))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return HubRecords(_split_of(datasets.load_from_disk(str(path)), split))
        if path.is_dir() or _looks_like_hub_id(path):
            return HubRecords(datasets.load_dataset(str(path), subset, split=split))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        told = explain(error, Context(subject=str(path)))
        unknown = str(error) if path.exists() else f"{error} There is no such file either."
        raise DataError(f"{path}: the data set cannot be loaded: {told or unknown}") from error
    raise _unreadable(path, "No such file or directory")


def _kind_of_file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        raise DataError(not_records(path, head))
    return _BINARY_MAGIC.get(head, "json") if not head.startswith(GZIP_MAGIC) else "json"


def _looks_like_hub_id(path: Path) -> bool:
    return is_hub_id(path) and path.suffix not in _SUFFIXES_OF_FILES


def _unreadable(path: Path, reason: str | None) -> DataError:
    return DataError(
        f"{path}: cannot read the data file: {reason}; mend its path in the stage file, "
        f"which is relative to the current folder ({Path.cwd()})"
    )


def _split_of(loaded: datasets.Dataset | datasets.DatasetDict, split: str) -> datasets.Dataset:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"it has no split {split!r}; set `split:` to one of {', '.join(loaded)}")
    return loaded[split]


def _open_pictures(images: str | Path | Mapping[str, str] | None, default: Path, cache: Path | None) -> Pictures:
    if images is None:
        return Pictures(PictureFolder(default))
    if isinstance(images, Mapping):
        folders = [Path(path) for path in images.values() if Path(path).is_dir()]
        return Pictures(PrefixedStores({prefix: _open_store(Path(p), cache, folders) for prefix, p in images.items()}))
    return Pictures(_open_store(Path(images), cache))


def _open_store(path: Path, cache: Path | None, folders: Iterable[Path] = ()) -> PictureStore:
    """A folder or an archive; `folders` are all declared ones, which links may lead to."""
    if path.is_file():
        return PictureArchive.open(path, cache)
    if path.is_dir():
        return PictureFolder(path, folders)
    raise DataError(
        f"{path}: there is no such image folder or archive; mend `images:` in the stage file, "
        f"which is relative to the current folder ({Path.cwd()})"
    )
