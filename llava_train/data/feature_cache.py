"""Features of pictures, computed once and read ever after: what a frozen vision tower makes of a picture's bytes.

    features/<hash of the encoder>/<name>.safetensors   features [N, image tokens, features], pictures uint8 [N, 16],
                                                        checksums uint8 [N, 8]
                                   .<name>.tmp          one that is being written
                                   lock                 held by the run that fills the cache

A picture goes by XXH3 of its bytes as stored, so that duplicates are kept once and a changed file is another picture.
A shard is written aside, to disk, and renamed: it is whole or absent. Readers map shards into memory, look up the row
of a picture, and compare the row with its checksum each time: a disk may lie years after.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_train.data.images import decode_image, stored_bytes
from llava_train.data.pictures import Picture
from llava_train.data.problems import DataError
from llava_train.files import rename_durably, share

_KEY_BYTES, _CHECKSUM_BYTES = 16, 8
KEY = np.dtype(f"S{_KEY_BYTES}")
"""Of arrays of `picture_key`."""
_SUFFIX, _UNFINISHED = ".safetensors", ".tmp"
_MOST_OPEN = 256
"""Shards that a process keeps mapped."""


class FeatureError(DataError):
    """The cache cannot give what it should. The message names the file and the mend."""


def picture_key(content: bytes) -> bytes:
    """What a picture goes by: 16 bytes."""
    return xxhash.xxh3_128_digest(content)


class FeatureCache:
    """Reads the features of pictures, in any process.

    Args:
        folder: of one encoder, see the head of this file.
        shape: image tokens and features of a picture.
        dtype: of the features.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._shards: tuple[str, ...] = ()
        self._keys = np.empty(0, dtype=KEY)  # sorted; of equal ones the first counts
        self._rows = np.empty((0, 2), dtype=np.int64)  # shard and row of each key

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def bytes_a_picture(self) -> int:
        """Disk space that a picture takes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize + _KEY_BYTES + _CHECKSUM_BYTES

    def open(self, shards: Sequence[str]) -> None:
        """Looks up what the shards hold; each must be whole, see `whole_shards`. Raises FeatureError."""
        keys = [_keys_of(self.folder / name) for name in shards]
        self._shards = tuple(shards)
        all_keys = np.concatenate([np.empty(0, dtype=KEY), *keys])
        places = [np.stack([np.full(len(of), i), np.arange(len(of))], axis=1) for i, of in enumerate(keys)]
        self._keys, first = np.unique(all_keys, return_index=True)
        self._rows = np.concatenate([np.empty((0, 2), dtype=np.int64), *places])[first]

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys [N] are cached: bool [N]."""
        return np.isin(keys, self._keys)

    def of_picture(self, picture: Picture) -> torch.Tensor:
        """The features of a picture: [image tokens, features].

        Raises:
            SampleError: the picture is bad, exactly where and as `decode_image` says so.
            FeatureError: it is good and not cached, or the cache is damaged.
        """
        key = np.array(picture_key(stored_bytes(picture)), dtype=KEY)
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            decode_image(picture)
            raise FeatureError(
                f"{picture}: changed, or became readable, after its features were looked for at the start of this "
                "run; start the run again, the same command computes what is missing"
            )
        shard, row = self._rows[place].tolist()
        return self._read(self.folder / self._shards[shard], row)

    def blank(self) -> torch.Tensor:
        """Features for a picture that is not there: zeros. No supervised token sees them."""
        return torch.zeros(self.shape, dtype=self.dtype)

    def _read(self, path: Path, row: int) -> torch.Tensor:
        try:
            features, checksums = _rows_of(path)
            found = features[row : row + 1][0]
        except (OSError, SafetensorError) as error:
            raise _unusable(path, f"cannot be read: {error}") from error
        if checksums[row].tobytes() != _checksum(found):
            raise _unusable(path, "is damaged: features have another checksum than when they were written")
        return found


def _unusable(path: Path, why: str) -> FeatureError:
    return FeatureError(f"{path}: {why}; delete the file, the same command computes again what it held and goes on")


def write_shard(folder: Path, keys: Sequence[bytes], features: torch.Tensor) -> str:
    """Writes features [N, image tokens, features] of pictures, to disk; returns the shard's name. Raises OSError."""
    rows = features.contiguous()
    content = {
        "features": rows,
        "pictures": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY_BYTES),
        "checksums": torch.frombuffer(bytearray(b"".join(map(_checksum, rows))), dtype=torch.uint8).view(
            -1, _CHECKSUM_BYTES
        ),
    }
    name = xxhash.xxh3_64_hexdigest(b"".join(keys)) + _SUFFIX
    temporary = folder / f".{name}{_UNFINISHED}"
    try:
        save_file(content, temporary)
        share(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        rename_durably(temporary, folder / name)
    except SafetensorError as error:  # what the system said, in words
        raise OSError(None, str(error), str(temporary)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return name


def whole_shards(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[str], list[str]]:
    """The shards of a folder that can be read, and a line for each other one. Deletes those, and unfinished ones.

    Only whoever holds the folder's lock may call it.
    """
    whole, removed = [], []
    for path in sorted(folder.glob(f".*{_UNFINISHED}")):
        path.unlink(missing_ok=True)
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if problem := _damage(path, shape, dtype):
            path.unlink(missing_ok=True)
            removed.append(f"{path} {problem}")
        else:
            whole.append(path.name)
    return whole, removed


def _damage(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """What is wrong with a shard's size and description; its rows are looked at when they are read."""
    with suppress(OSError, SafetensorError, KeyError):
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice("features")
            n_pictures = stored.get_shape()[0]
            is_whole = (
                tuple(stored.get_shape()[1:]) == shape
                and stored[:0].dtype == dtype
                and file.get_slice("pictures").get_shape() == [n_pictures, _KEY_BYTES]
                and file.get_slice("checksums").get_shape() == [n_pictures, _CHECKSUM_BYTES]
            )
        return None if is_whole else "holds something else"
    return "is cut off or damaged"


def _keys_of(path: Path) -> np.ndarray:
    """Keys of the pictures of a shard: [N] of 16 bytes. Raises FeatureError."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("pictures").numpy().copy().view(KEY)[:, 0]
    except (OSError, SafetensorError) as error:
        raise _unusable(path, f"cannot be read: {error}") from error


@lru_cache(maxsize=_MOST_OPEN)
def _rows_of(path: Path) -> tuple[Any, np.ndarray]:
    """A shard's features, to be read by row, and their checksums uint8 [N, 8]."""
    file = safe_open(path, framework="pt")
    return file.get_slice("features"), file.get_tensor("checksums").numpy().copy()


def _checksum(row: torch.Tensor) -> bytes:
    return xxhash.xxh3_64_digest(row.contiguous().flatten().view(torch.uint8).numpy().data)
