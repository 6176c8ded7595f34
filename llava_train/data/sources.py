"""One source of samples: its records, and its pictures. What it is is told from its content.

a file     JSON list or JSONL, plain or gzipped; Parquet; Arrow
a folder   what `datasets` saved (`save_to_disk`), or whatever `datasets.load_dataset` reads
owner/name a data set of the Hugging Face hub, where there is no such file
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from llava_train.data.archives import PictureArchive
from llava_train.data.formats import parse_record, record_id
from llava_train.data.other_formats import not_records
from llava_train.data.paths import advice_on_path
from llava_train.data.pictures import PictureFolder, Pictures, PictureStore, PrefixedStores
from llava_train.data.problems import DataError, SampleError, shortened
from llava_train.data.records import GZIP_MAGIC, JsonRecords
from llava_train.data.samples import Sample
from llava_train.failures import explain
from llava_train.failures.words import Context
from llava_train.files import is_hub_id
from llava_train.git_lfs import lfs_problem

if TYPE_CHECKING:
    import datasets

_SUFFIXES_OF_FILES = (".json", ".jsonl", ".gz", ".parquet", ".arrow", ".zip", ".tar", ".csv")
"""What misses such a file must not be told of the hub."""
_BINARY_MAGIC = {b"PAR1": "parquet", b"ARRO": "feather", b"\xff\xff\xff\xff": "arrow"}


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
    if not value.is_valid:
        return None
    if isinstance(value, pa.StringScalar | pa.LargeStringScalar):
        return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")  # what is not UTF-8 spoils its text
    if isinstance(value, pa.BinaryScalar | pa.LargeBinaryScalar):
        return value.as_buffer()
    if isinstance(value, pa.ListScalar | pa.LargeListScalar):
        return [_as_python(inner) for inner in value.values]
    if isinstance(value, pa.StructScalar):
        return {name: _as_python(inner) for name, inner in value.items()}
    try:
        return value.as_py()
    except (ValueError, OverflowError):  # a date beyond the year 9999, say
        return f"{value.type} out of range"


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
    records = _open_records(str(path), subset, split, cache)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return Source(str(path), name or Path(path).name.split(".")[0], records, _open_pictures(images, folder, cache))


def _open_records(stated: str, subset: str | None, split: str | None, cache: Path | None) -> Records:
    path = Path(stated)
    try:
        kind = _kind_of_file(path) if path.is_file() else None
        is_folder = path.is_dir()
    except OSError as error:
        raise _unreadable(stated, error.strerror) from error
    if kind and (subset or split):
        raise DataError(f"{path}: a file has no `subset:` or `split:`; remove the key, or name a data set")
    if kind == "json":
        return JsonRecords(path, cache)
    if is_folder and (problem := _lfs_problem_in(path)):
        raise DataError(problem)
    if not (kind or is_folder or _looks_like_hub_id(path)):
        raise _unreadable(stated, "No such file or directory")
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        if cache is not None:
            rows = _load_rows(path, kind, subset, split or "train", cache)
        else:
            with TemporaryDirectory(prefix="llava_train-") as folder:  # rows stay mapped from files that are deleted
                rows = _load_rows(path, kind, subset, split or "train", Path(folder))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        told = explain(error, Context(subject=stated))
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None  # else it says nothing
        unknown = str(cause or error) if path.exists() else f"{error} There is no such file either."
        raise DataError(f"{path}: the data set cannot be loaded: {told or unknown}") from error
    if not len(rows):
        raise DataError(f"{path}: holds no sample")
    return rows


def _load_rows(path: Path, kind: str | None, subset: str | None, split: str, cache: Path) -> HubRecords:
    """The rows of a file, a folder or a hub id. Copies are kept in `cache`: a home folder may be small or read-only."""
    import datasets  # an eighth of all that a start imports, and JSON does not need it
    import pyarrow.parquet as pq

    if kind == "parquet":
        if not pq.read_metadata(path).num_rows:  # on which `datasets` fails
            raise ValueError("it holds no sample")
        return HubRecords(datasets.Dataset.from_parquet(str(path), cache_dir=str(cache)))
    if kind == "arrow":
        return HubRecords(datasets.Dataset.from_file(str(path)))
    if kind == "feather":
        return HubRecords(_feather_rows(path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return HubRecords(_split_of(datasets.load_from_disk(str(path)), split))
    if path.is_dir():
        return HubRecords(datasets.load_dataset(str(path), subset, split=split, cache_dir=str(cache)))
    return HubRecords(datasets.load_dataset(str(path), subset, split=split))


def _feather_rows(path: Path) -> datasets.Dataset:
    """The rows of Arrow's file format, which pandas calls Feather; `datasets` reads streams only."""
    import datasets

    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    state = path.stat()
    content = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16]
    )


def _kind_of_file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        raise DataError(not_records(path, head))
    return _BINARY_MAGIC.get(head, "json") if not head.startswith(GZIP_MAGIC) else "json"


def _looks_like_hub_id(path: Path) -> bool:
    return is_hub_id(path) and path.suffix not in _SUFFIXES_OF_FILES


def _lfs_problem_in(folder: Path) -> str | None:
    """Says which data file of a folder is a Git LFS pointer; None where all are there."""
    files = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES_OF_FILES)
    return next((problem for path in files if (problem := lfs_problem(path))), None)


def _unreadable(path: str, reason: str | None) -> DataError:
    advice = advice_on_path(path) or (
        f"fix its path in the stage file, which is relative to the current folder ({Path.cwd()})"
    )
    made = "; `python data/draw_scenes.py` draws those of configs/small" if path.startswith("data/scenes/") else ""
    return DataError(f"{shortened(path)}: cannot read the data file: {reason}; {advice}{made}")


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
        stores = {prefix: _open_store(path, cache, prefix, folders) for prefix, path in images.items()}
        return Pictures(PrefixedStores(stores))
    return Pictures(_open_store(str(images), cache))


def _open_store(
    stated: str, cache: Path | None, prefix: str | None = None, folders: Iterable[Path] = ()
) -> PictureStore:
    """A folder or an archive.

    Args:
        prefix: of a mapping of prefixes.
        folders: all declared ones, which links may lead to.
    """
    path = Path(stated)
    try:
        if path.is_file():
            return PictureArchive.open(path, cache)
        if path.is_dir():
            return PictureFolder(path, folders, prefix)
        reason = "there is no such image folder or archive"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    advice = advice_on_path(stated) or (
        f"fix `images:` in the stage file, which is relative to the current folder ({Path.cwd()})"
    )
    raise DataError(f"{shortened(stated)}: {reason}; {advice}")
