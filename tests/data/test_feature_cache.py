from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_train.data.feature_cache import (
    KEY,
    FeatureCache,
    FeatureError,
    picture_key,
    whole_shards,
    write_shard,
)
from llava_train.data.images import decode_image
from llava_train.data.pictures import Picture, PictureFolder
from llava_train.data.problems import SampleError

SHAPE = (4, 3)


def features_of(n_pictures: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_pictures, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pictures_in(folder: Path, n_pictures: int) -> list[Picture]:
    for number in range(n_pictures):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{number}.png")
    return [PictureFolder(folder).find(f"{number}.png") for number in range(n_pictures)]


def key_of(picture: Picture) -> bytes:
    with picture.open("rb") as file:
        return picture_key(file.read())


def opened(folder: Path, *shards: str, dtype: torch.dtype = torch.float32) -> FeatureCache:
    cache = FeatureCache(folder, SHAPE, dtype)
    cache.open(shards)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_from_any_shard(dtype: torch.dtype, tmp_path: Path) -> None:
    pictures, features = pictures_in(tmp_path, 5), features_of(5, dtype)
    keys = list(map(key_of, pictures))
    shards = [write_shard(tmp_path, keys[:2], features[:2]), write_shard(tmp_path, keys[2:], features[2:])]
    assert whole_shards(tmp_path, SHAPE, dtype) == (sorted(shards), [])
    cache = opened(tmp_path, *shards, dtype=dtype)
    assert len(cache) == 5
    for picture, expected in zip(pictures, features, strict=True):
        found = cache.of_picture(picture)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=3), max_size=12), st.lists(st.binary(max_size=3), max_size=12))
def test_keys_are_found_whatever_their_bytes(
    tmp_path_factory: pytest.TempPathFactory, held: list[bytes], asked: list[bytes]
) -> None:
    """Also those that end with zeros, which numpy's strings do not show."""
    folder = tmp_path_factory.mktemp("keys")
    padded_held, padded_asked = ([key.ljust(16, b"\0") for key in keys] for keys in (held, asked))
    shards = [write_shard(folder, padded_held, features_of(len(held)))] if held else []
    cache = opened(folder, *shards)
    assert len(cache) == len(set(padded_held))
    assert cache.has(np.array(padded_asked, dtype=KEY)).tolist() == [key in padded_held for key in padded_asked]


def test_a_copy_of_a_picture_has_its_features(tmp_path: Path) -> None:
    [picture] = pictures_in(tmp_path, 1)
    cache = opened(tmp_path, write_shard(tmp_path, [key_of(picture)], features_of(1)))
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert torch.equal(cache.of_picture(PictureFolder(tmp_path).find("copy.png")), features_of(1)[0])


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG no picture", None])
def test_a_bad_picture_raises_what_decoding_raises(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    picture = PictureFolder(tmp_path).find("bad.png")
    with pytest.raises(SampleError) as decoded:
        decode_image(picture)
    with pytest.raises(SampleError) as cached:
        opened(tmp_path).of_picture(picture)
    assert (cached.value.kind, str(cached.value)) == (decoded.value.kind, str(decoded.value))


def test_a_picture_that_changed_since_is_refused_with_the_mend(tmp_path: Path) -> None:
    [picture] = pictures_in(tmp_path, 1)
    cache = opened(tmp_path, write_shard(tmp_path, [key_of(picture)], features_of(1)))
    Image.new("RGB", (5, 5)).save(tmp_path / "0.png")
    with pytest.raises(FeatureError, match=r"0\.png: changed, .* start the run again"):
        cache.of_picture(picture)


def test_no_flipped_bit_of_features_is_trained_on(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, 2)
    name = write_shard(tmp_path, list(map(key_of, pictures)), features_of(2))
    stored = load_file(tmp_path / name)
    stored["features"][1].view(torch.int32)[2, 2] ^= 1
    save_file(stored, tmp_path / name)
    assert whole_shards(tmp_path, SHAPE, torch.float32) == ([name], [])
    cache = opened(tmp_path, name)
    assert torch.equal(cache.of_picture(pictures[0]), features_of(2)[0])
    with pytest.raises(FeatureError, match=rf"{name}: is damaged: .*; delete the file, the same command computes"):
        cache.of_picture(pictures[1])


def test_shards_that_are_cut_off_or_of_another_shape_are_deleted(tmp_path: Path) -> None:
    keys = [picture_key(bytes([number])) for number in range(4)]
    whole, cut, empty, other = (write_shard(tmp_path, [key], features_of(1)) for key in keys)
    (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-3])
    (tmp_path / empty).write_bytes(b"")
    save_file({"features": torch.zeros(1, 2, 2)}, tmp_path / other)
    (tmp_path / f".{whole}.tmp").write_bytes(b"killed while writing")
    (tmp_path / "lock").touch()
    left, removed = whole_shards(tmp_path, SHAPE, torch.float32)
    assert left == [whole]
    assert len(removed) == 3
    assert {path.name for path in tmp_path.iterdir()} == {whole, "lock"}
    assert whole_shards(tmp_path, SHAPE, torch.bfloat16)[0] == [], "of another precision"


def test_nothing_is_left_of_a_shard_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("llava_train.data.feature_cache.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, [bytes(16)], features_of(1))
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_a_shard(tmp_path: Path) -> None:
    """safetensors lets only the owner read its files."""
    name = write_shard(tmp_path, [bytes(16)], features_of(1))
    (tmp_path / "plain").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
