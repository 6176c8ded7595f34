"""Precomputed vision features: a frozen tower sees each picture of a run once, before the first step.

In order, while rank 0 holds the lock of the encoder's folder: every rank reads its share of the run's pictures and
tells their keys -> those that are not cached are counted, once each, and their size is said and compared with the
disk -> in rounds, every rank encodes its share and writes it as one shard -> after each round the ranks agree whether
to go on. A run that is stopped or killed in between goes on after its last shards. A bad picture is left out here;
the step that needs it finds it as bad as without a cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset

from llava_train.config import StageConfig
from llava_train.data.feature_cache import KEY, FeatureCache, FeatureError, picture_key, whole_shards, write_shard
from llava_train.data.images import ImagePreprocessor, decode_image, stored_bytes
from llava_train.data.loader import StepDataset, read_steps
from llava_train.data.mixture import Mixture
from llava_train.data.order import step_samples
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.problems import SampleError
from llava_train.model.build import Llava
from llava_train.model.features import encode, encoder_hash, feature_shape, vision_tower_of
from llava_train.model.kernels import uncompiled
from llava_train.train.interrupt import Preempted
from llava_train.train.session import Session
from llava_train.train.world import World

FOLDER = "features"
"""Below the cache of the stage file's `output`."""
_LOCK_FILE, _LOCK_LOOK_S = "lock", 2.0
_TOGETHER, _SAMPLES_TOGETHER = 32, 64
"""Pictures that the encoder sees at once, and samples whose pictures a worker looks up at once."""
_SHARD_BYTES, _MOST_A_SHARD = 256_000_000, 4096
"""Bytes, and pictures, of a shard: a killed run has no more to do again on each rank."""
_SPARE_BYTES = 64_000_000
_PATIENCE = 6.0
"""How many times `engine.hang_timeout_s` a part may take, as at any start: data may lie far away."""


@dataclass(frozen=True)
class _Found:
    """N pictures of a mixture."""

    keys: np.ndarray  # KEY [N]
    places: np.ndarray  # int64 [N, 2]; sample of the mixture, and number of the picture in it

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, which: slice | np.ndarray) -> _Found:
        return _Found(self.keys[which], self.places[which])


@dataclass(frozen=True)
class _Batch:
    """Good pictures to encode."""

    keys: list[bytes]
    pixel_values: torch.Tensor  # float32 [N, 3, H, W]


def cached_features(
    config: StageConfig, session: Session, llava: Llava, dataset: StepDataset, steps: range
) -> FeatureCache:
    """A cache with the features of every good picture of these steps. Every rank must call it.

    Args:
        llava: its tower in evaluation mode and not yet spread over the ranks.
        dataset: of the run, in its order.

    Raises:
        FeatureError: the disk has not the room, or cannot be written.
        Preempted: somebody asked to stop; what was computed is kept.
    """
    world, dtype = session.world, vision_tower_of(llava.model).dtype
    world.beat("looking for cached features", patience=_PATIENCE)
    folder = config.cache_dir / FOLDER / world.on_main(lambda: encoder_hash(llava, world.device.type))
    cache = FeatureCache(folder, feature_shape(llava), dtype)
    with _alone(folder, config, session):
        whole, removed = world.on_main(lambda: whole_shards(folder, cache.shape, dtype))
        for line in removed:
            world.say(f"loader.cache_features: {line}; computing again what it held")
        cache.open(whole)
        found = _pictures_of(dataset, _samples_of(dataset, steps), config.loader.workers, world)
        missing = _missing(found, cache)
        world.say(_state(cache, len(np.unique(found.keys)), len(missing)))
        if len(missing):
            world.on_main(lambda: _check_room(cache, len(missing)))
            cache.open(whole + _fill(config, session, llava, dataset, cache, missing))
    return cache


@contextmanager
def _alone(folder: Path, config: StageConfig, session: Session) -> Iterator[None]:
    """Keeps a folder to this run. One that fills it is waited for: it may compute the same. Raises Preempted."""
    world = session.world
    world.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    lock, waits = FileLock(folder / _LOCK_FILE), False
    try:
        while not world.on_main(lambda: _taken(lock)):
            if not waits:
                world.say(f"loader.cache_features: another run writes to {folder}; waiting for it")
            waits = True
            world.beat("waiting for the run that computes features")
            if why := next(filter(None, world.gather(session.stop.reason(world.is_main))), None):
                _stop(config, session, why)
        yield
    finally:
        lock.release()


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=_LOCK_LOOK_S)
    except Timeout:
        return False
    return True


def _samples_of(dataset: StepDataset, steps: range) -> np.ndarray:
    """The samples that steps train on: int64, ascending, each once."""
    n_samples, size = len(dataset.mixture), dataset.batch_size
    if len(steps) >= 2 * -(-n_samples // size):  # wherever they begin, a whole epoch is among them
        return np.arange(n_samples)
    assert dataset.seed is not None
    of_steps = [step_samples(step, dataset.seed, n_samples, size) for step in steps]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *of_steps]))


def _pictures_of(dataset: StepDataset, samples: np.ndarray, n_workers: int, world: World) -> _Found:
    """The readable pictures of samples. The ranks share the work and know the same afterwards."""
    own = samples[world.rank :: world.n_ranks]
    chunks = [own[start : start + _SAMPLES_TOGETHER] for start in range(0, len(own), _SAMPLES_TOGETHER)]
    found = []
    with closing(read_steps(_Keys(dataset.mixture, chunks), range(len(chunks)), n_workers, pin_memory=False)) as parts:
        for part in parts:
            world.touch()
            found.append(part)
    return _joined([part for of_rank in world.gather(found) for part in of_rank])


def _joined(parts: Sequence[_Found]) -> _Found:
    keys, places = np.empty(0, dtype=KEY), np.empty((0, 2), dtype=np.int64)
    return _Found(
        np.concatenate([keys, *(part.keys for part in parts)]),
        np.concatenate([places, *(part.places for part in parts)]),
    )


def _missing(found: _Found, cache: FeatureCache) -> _Found:
    """Those that are not cached, each once, in the order of the mixture: neighbours are read one after another."""
    keys, first = np.unique(found.keys, return_index=True)
    once = found[first[~cache.has(keys)]]
    return once[np.lexsort((once.places[:, 1], once.places[:, 0]))]


def _state(cache: FeatureCache, n_pictures: int, n_missing: int) -> str:
    """What there is and what is to be done, in words."""
    if not n_missing:
        return f"loader.cache_features: all {n_pictures:,} pictures are in {cache.folder}"
    n_bytes = cache.bytes_a_picture
    return (
        f"loader.cache_features: encoding {n_missing:,} of {n_pictures:,} pictures, {n_bytes / 1e3:,.1f} KB each, "
        f"{n_missing * n_bytes / 1e9:,.2f} GB in {cache.folder}"
    )


def _check_room(cache: FeatureCache, n_pictures: int) -> None:
    """Raises FeatureError."""
    free, needed = shutil.disk_usage(cache.folder).free, n_pictures * cache.bytes_a_picture + _SPARE_BYTES
    if free < needed:
        raise FeatureError(
            f"loader.cache_features: {n_pictures:,} pictures take {needed / 1e9:,.2f} GB, and {cache.folder} has "
            f"{free / 1e9:,.2f} GB left; make room, set output to a larger disk, or set the key to false"
        )


def _fill(
    config: StageConfig, session: Session, llava: Llava, dataset: StepDataset, cache: FeatureCache, missing: _Found
) -> list[str]:
    """Encodes and writes what is missing, in rounds; returns the new shards, on every rank alike.

    Raises:
        FeatureError, Preempted: what was computed is written.
    """
    world, written = session.world, list[str]()
    vision_tower_of(llava.model).to(world.device)
    rounds = list(_rounds(missing, cache.bytes_a_picture, world.rank, world.n_ranks))
    pixels = _Pixels(dataset.mixture, dataset.preprocessor, [batch for of_round in rounds for batch in of_round])
    with closing(read_steps(pixels, range(len(pixels.batches)), config.loader.workers, pin_memory=False)) as batches:
        for number, of_round in enumerate(rounds, start=1):
            world.beat(f"computing features, round {number} of {len(rounds)}", patience=_PATIENCE)
            name, problem = None, None
            try:
                name = _encode_round(llava, cache, batches, len(of_round), session)
            except OSError as error:
                problem = f"{error.filename or cache.folder}: {error.strerror or error}"
            told = world.gather((name, problem, session.stop.reason(world.is_main)))
            written += [name for name, _, _ in told if name]
            if failures := [f"rank {rank}: {problem}" for rank, (_, problem, _) in enumerate(told) if problem]:
                raise FeatureError(
                    f"loader.cache_features: cannot write features: {'; '.join(failures)}; mend that, and the same "
                    "command goes on where it stopped, or set the key to false"
                )
            if why := next((why for *_, why in told if why), None):
                _stop(config, session, why)
            world.say(f"loader.cache_features: round {number} of {len(rounds)} done")
    return written


def _rounds(missing: _Found, bytes_a_picture: int, rank: int, n_ranks: int) -> Iterator[list[_Found]]:
    """What a rank encodes in each round, in batches: of 5 pictures on 2 ranks, rank 0 has 0, 2, 4, rank 1 has 1, 3."""
    a_shard = max(1, min(_SHARD_BYTES // bytes_a_picture, _MOST_A_SHARD))
    for start in range(0, len(missing), a_shard * n_ranks):
        own = missing[start : start + a_shard * n_ranks][rank::n_ranks]
        yield [own[first : first + _TOGETHER] for first in range(0, len(own), _TOGETHER)]


def _encode_round(
    llava: Llava, cache: FeatureCache, batches: Iterator[_Batch], n_batches: int, session: Session
) -> str | None:
    """Writes one shard, of the next batches or of those before somebody asks to stop. Returns its name. OSError."""
    world, keys, features = session.world, list[bytes](), list[torch.Tensor]()
    for _ in range(n_batches):
        batch = next(batches)
        world.touch()
        if batch.keys:
            keys += batch.keys
            with torch.no_grad(), uncompiled(llava.model):  # whatever `engine.kernels` says, the bits are the same
                features.append(encode(llava.model, batch.pixel_values.to(world.device)).cpu())
        if session.stop.reason(world.is_main):
            break
    return write_shard(cache.folder, keys, torch.cat(features)) if keys else None


def _stop(config: StageConfig, session: Session, why: str) -> NoReturn:
    """Every rank must call it. Raises Preempted."""
    session.stop.done(session.world.is_main)
    session.world.barrier()  # a launcher signals the others when the first rank has gone
    raise Preempted(f"{config.name}: asked to stop by {why} while features were computed; the same command goes on")


class _Keys(Dataset[_Found]):
    """`keys[chunk]` are the readable pictures of that chunk of samples."""

    def __init__(self, mixture: Mixture, chunks: Sequence[np.ndarray]) -> None:
        self.mixture, self.chunks = mixture, chunks

    def __getitem__(self, chunk: int) -> _Found:
        keys, places = list[bytes](), list[tuple[int, int]]()
        for sample in self.chunks[chunk].tolist():
            with suppress(SampleError):
                for number, picture in enumerate(self.mixture[sample].images):
                    keys.append(picture_key(stored_bytes(picture)))
                    places.append((sample, number))
        return _Found(np.array(keys, dtype=KEY), np.array(places, dtype=np.int64).reshape(-1, 2))


class _Pixels(Dataset[_Batch]):
    """`pixels[batch]` are the good ones of those pictures, prepared for the encoder."""

    def __init__(self, mixture: Mixture, preprocessor: ImagePreprocessor, batches: Sequence[_Found]) -> None:
        self.mixture, self.preprocessor, self.batches = mixture, preprocessor, batches

    def __getitem__(self, batch: int) -> _Batch:
        keys, pixels = list[bytes](), list[torch.Tensor]()
        for sample, number in self.batches[batch].places.tolist():
            picture = self.mixture[sample].images[number]
            try:
                content = stored_bytes(picture)
                pixels.append(self.preprocessor(decode_image(EmbeddedPicture(content))))
            except SampleError:
                continue
            keys.append(picture_key(content))  # of what was decoded, should the file have changed
        size = self.preprocessor.size
        return _Batch(keys, torch.stack(pixels) if pixels else torch.empty(0, 3, size, size))
