"""The doctor: reads all the data of a stage, as its run would, and tells what would be lost.

Worker processes read, render, tokenize and decode every sample of every source once, in chunks; what they find is
put together here. Beside what keeps a sample from being trained on (`data.problems.KINDS`) it finds what is handled,
but may surprise (`NOTES`).
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from rich.progress import Progress

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED
from llava_train.data.formats import picture_markup, record_id, unread_paths
from llava_train.data.images import DAMAGED, decoded, open_image
from llava_train.data.mixture import Mixture
from llava_train.data.order import n_steps_of, step_samples
from llava_train.data.packing import plan_packs
from llava_train.data.pictures import Picture
from llava_train.data.problems import DataError, SampleError, shortened
from llava_train.data.rgb import has_transparency
from llava_train.data.samples import Sample
from llava_train.data.sources import Source
from llava_train.data.survey import Survey, refuse_without_pictures, warnings_of
from llava_train.errors import UserError
from llava_train.inspect.opening import StageData

NOTES = {
    "truncated": "samples cut to batch.max_sample_tokens: what lies behind is lost",
    "duplicate_id": "samples whose id another sample of the source has; all are trained on",
    "wrong_extension": "pictures whose name says another format; read by their content",
    "animated": "animated pictures; the first frame is read",
    "several_pages": "TIFF files of several pages; the first is read",
    "unusual_mode": "pictures in CMYK, 16 bits or a palette; converted to RGB",
    "transparent": "pictures with an alpha channel or a transparent colour; laid on white",
    "white_on_white": "transparent pictures that are white all over once laid on white",
    "rotated": "pictures that their EXIF tag turns; turned",
    "picture_markup": "samples without a picture whose text has markup of one: it is trained on as letters",
    "extreme_shape": "pictures of one pixel, or more than 20 times as long as wide",
}
"""What is handled, but noticed."""
LOSSES = ("truncated",)
"""Notes of samples that lose something."""

_CHUNK = 64
_N_PACKED_STEPS = 200


@dataclass(frozen=True)
class Finding:
    """A problem or note of one sample."""

    kind: str
    source: str
    id: str
    index: int
    line: int | None
    reason: str


@dataclass
class Examined:
    """What was found in samples of one source: arrays by sample, 0 where a sample cannot be trained on."""

    indices: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    n_supervised: list[int] = field(default_factory=list)
    n_images: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """A hash of 64 bits of each id."""
    findings: list[Finding] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    """Number of samples that hold a value under each key that nothing reads."""

    def add(self, other: Examined) -> None:
        for name, values in vars(self).items():
            if isinstance(values, list):
                values.extend(getattr(other, name))
        self.unread.update(other.unread)


@dataclass(frozen=True)
class Checked:
    """What was found in all the data of a stage."""

    by_source: tuple[Examined, ...]
    held_out: tuple[Examined, ...]
    """Of the sources of `eval.data`."""
    lengths: np.ndarray  # int64 [samples of an epoch]; 0 where a sample cannot be trained on
    n_steps: int
    packing: dict[str, float]
    refusal: str | None = None
    """Why a run on these data would be refused, although samples are good."""
    warnings: tuple[str, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        return [finding for examined in (*self.by_source, *self.held_out) for finding in examined.findings]

    @property
    def would_lose(self) -> bool:
        """Whether a run would not train on every token of every sample."""
        kinds = {finding.kind for finding in self.findings}
        return self.refusal is not None or any(kind not in NOTES or kind in LOSSES for kind in kinds)


class Examiner:
    """Examines samples as a run would read them.

    Args:
        decode: False reads of pictures the headers only.
    """

    def __init__(self, data: StageData, decode: bool) -> None:
        self.data, self.decode = data, decode

    def examine(self, source: Source, indices: Iterable[int]) -> Examined:
        """Raises nothing: what is wrong is found."""
        examined = Examined()
        for index in indices:
            notes: list[tuple[str, str]] = []
            counts, name = (0, 0, 0), str(index)
            try:
                record = source.records[index]
                name = record_id(record, name)
                examined.unread.update(unread_paths(record))
                counts = self._counts(source.parse(record, index), notes)
            except SampleError as error:
                notes.append((error.kind, str(error)))
            examined.indices.append(index)
            for values, count in zip(
                (examined.n_tokens, examined.n_supervised, examined.n_images), counts, strict=True
            ):
                values.append(count)
            digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            examined.ids.append(int.from_bytes(digest, "big"))
            examined.findings += [
                Finding(kind, source.path, name, index, source.line(index), reason)
                for kind, reason in dict(notes).items()
            ]
        return examined

    def _counts(self, sample: Sample, notes: list[tuple[str, str]]) -> tuple[int, int, int]:
        """Tokens, supervised tokens and images of a sample. Raises SampleError."""
        encoded = self.data.encoder.encode(sample)
        if (markup := picture_markup(sample)) is not None:
            notes.append(("picture_markup", f"the text holds {shortened(markup, 60)!r}"))
        if encoded.truncated:
            notes.append(("truncated", f"cut to {encoded.n_tokens} tokens"))
        for picture in sample.images[: encoded.n_images]:
            notes += self._look_at(picture)
        return encoded.n_tokens, int((encoded.labels != IGNORED).sum()), encoded.n_images

    def _look_at(self, picture: Picture) -> Iterator[tuple[str, str]]:
        with open_image(picture) as image:
            yield from picture_notes(image, str(picture))
            if self.decode:
                is_transparent, rgb = has_transparency(image), decoded(image, picture)
                if is_transparent and rgb.getextrema() == ((255, 255),) * 3:
                    yield "white_on_white", f"{picture}: nothing is left to see"
                self.data.preprocessor(rgb)


def picture_notes(image: Image.Image, name: str) -> Iterator[tuple[str, str]]:
    """Notes of a picture whose header was read."""
    extensions = Image.registered_extensions()
    stated = extensions.get(PurePath(name).suffix.lower())
    if stated is not None and stated != image.format and {stated, image.format} != {"JPEG", "MPO"}:
        yield "wrong_extension", f"{name} is a {image.format}"
    if image.mode not in ("RGB", "L", "1", "RGBA", "LA"):
        yield "unusual_mode", f"{name} is of mode {image.mode}"
    if has_transparency(image):
        how = "an alpha channel" if "A" in image.getbands() else "a transparent colour"
        yield "transparent", f"{name} has {how}"
    if (orientation := _orientation(image)) not in (0, 1):
        yield "rotated", f"{name} has orientation {orientation}"
    short, long = sorted(image.size)
    if long == 1 or long > 20 * short:
        yield "extreme_shape", f"{name} has {image.width} x {image.height} pixels"
    n_frames = 1 if image.format == "MPO" else _n_frames(image)  # a phone's MPO: its depth, gain map or preview
    if n_frames > 1 and image.format == "TIFF":
        yield "several_pages", f"{name} has {n_frames} pages"
    elif n_frames > 1:
        yield "animated", f"{name} has {n_frames} frames"


def _orientation(image: Image.Image) -> Any:
    """What the EXIF tag says; 1 where only decoding would tell (a PNG may have it behind its pixels)."""
    if image.format == "PNG" and not image.info.keys() & {"exif", "Raw profile type exif"}:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1


def _n_frames(image: Image.Image) -> int:
    """Frames or pages of a file; 1 where they cannot be counted, for the first may be whole all the same."""
    try:
        return int(getattr(image, "n_frames", 1))
    except DAMAGED:
        return 1


def check_data(
    config: StageConfig, data: StageData, decode: bool, n_workers: int, n_ranks: int, progress: Progress
) -> Checked:
    """Examines every sample that an epoch has, once, and the held-out ones.

    Args:
        decode: False reads of pictures the headers only.
        n_ranks: for the estimate of packing.

    Raises:
        UserError: the system ended a worker process.
    """
    mixtures = [data.mixture, data.held_out] if data.held_out else [data.mixture]
    found = [tuple(Examined() for _ in mixture.sources) for mixture in mixtures]
    chunks = [chunk for number, mixture in enumerate(mixtures) for chunk in _chunks(number, mixture)]
    task = progress.add_task("checking", total=sum(len(chunk.indices) for chunk in chunks))
    for chunk, examined in zip(chunks, _examine_in_parallel(Examiner(data, decode), chunks, n_workers), strict=True):
        found[chunk.mixture_number][chunk.source_number].add(examined)
        progress.advance(task, len(chunk.indices))
    for mixture, by_source in zip(mixtures, found, strict=True):
        for source, examined in zip(mixture.sources, by_source, strict=True):
            examined.findings += _duplicates(source, examined)
    lengths = _epoch_lengths(data, found[0])
    n_steps = n_steps_of(len(lengths), config.batch.size, config.schedule.epochs, config.schedule.max_steps)
    packing = _expected_packing(config, lengths, n_steps, n_ranks, data.attention_cost)
    trained, counts = set(config.trainable.learning_rates()), _counted(found[0])
    refusal = None
    try:
        refuse_without_pictures(counts, trained)
    except DataError as error:
        refusal = str(error)
    warnings = tuple(warnings_of(counts, trained))
    return Checked(found[0], found[1] if data.held_out else (), lengths, n_steps, packing, refusal, warnings)


def _counted(by_source: Iterable[Examined]) -> Survey:
    """A survey of all samples that can be trained on."""
    n_images = [n for each in by_source for n, n_tokens in zip(each.n_images, each.n_tokens, strict=True) if n_tokens]
    n_with_markup = sum(finding.kind == "picture_markup" for each in by_source for finding in each.findings)
    return Survey(len(n_images), sum(map(bool, n_images)), n_with_markup)


@dataclass(frozen=True)
class Chunk:
    """Samples that one worker examines in one go."""

    mixture_number: int
    """0 for what is trained on, 1 for the held-out samples."""
    source: Source
    source_number: int
    indices: list[int]


_examiner: Examiner
_chunks_of_worker: list[Chunk]
"""Of a worker process, which inherits them: sources are not sent."""


def _examine_in_parallel(examiner: Examiner, chunks: list[Chunk], n_workers: int) -> Iterator[Examined]:
    """What worker processes find in each chunk, in order. Raises UserError."""
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(n_workers, context, initializer=_start_worker, initargs=(examiner, chunks)) as pool:
            yield from pool.map(_examine_chunk, range(len(chunks)))
    except BrokenProcessPool as error:
        raise UserError(
            "check: the system ended a worker process, short of memory perhaps; use fewer --workers"
        ) from error


def _start_worker(examiner: Examiner, chunks: list[Chunk]) -> None:
    global _examiner, _chunks_of_worker
    _examiner, _chunks_of_worker = examiner, chunks
    torch.set_num_threads(1)


def _chunks(mixture_number: int, mixture: Mixture) -> Iterator[Chunk]:
    for number, source in enumerate(mixture.sources):
        taken = np.unique(mixture.taken_of(number)).tolist()
        for start in range(0, len(taken), _CHUNK):
            yield Chunk(mixture_number, source, number, taken[start : start + _CHUNK])


def _examine_chunk(number: int) -> Examined:
    chunk = _chunks_of_worker[number]
    return _examiner.examine(chunk.source, chunk.indices)


def _duplicates(source: Source, examined: Examined) -> Iterator[Finding]:
    """A finding for each sample whose id an earlier one has."""
    _, first = np.unique(np.array(examined.ids, dtype=np.uint64), return_index=True)
    again = np.ones(len(examined.ids), dtype=bool)
    again[first] = False
    for position in np.flatnonzero(again).tolist():
        index = examined.indices[position]
        name = source.record_id(index)
        yield Finding("duplicate_id", source.path, name, index, source.line(index), f"the id {name!r} occurs before")


def _epoch_lengths(data: StageData, by_source: Iterable[Examined]) -> np.ndarray:
    """Tokens of each sample of the mixture."""
    lengths = []
    for number, examined in enumerate(by_source):
        of_index = dict(zip(examined.indices, examined.n_tokens, strict=True))
        lengths += [of_index[index] for index in data.mixture.taken_of(number).tolist()]
    return np.array(lengths, dtype=np.int64)


def _expected_packing(
    config: StageConfig, lengths: np.ndarray, n_steps: int, n_ranks: int, attention_cost: float
) -> dict[str, float]:
    """How well the first steps of the run pack: micro-steps, share of `batch.max_tokens` filled, balance over ranks."""
    micro_steps, tokens, heaviest = [], 0, 0
    for step in range(min(n_steps, _N_PACKED_STEPS)):
        chosen = lengths[step_samples(step, config.seed, len(lengths), config.batch.size)]
        sizes = chosen[chosen > 0].tolist()
        if not sizes:
            continue
        plan = plan_packs(sizes, n_ranks, config.batch.max_tokens, attention_cost, config.batch.packing)
        loads = [[sum(sizes[i] for i in pack) for pack in packs] for packs in plan]
        micro_steps.append(len(loads[0]))
        tokens += sum(sizes)
        heaviest += sum(max(loads[rank][micro] for rank in range(n_ranks)) for micro in range(len(loads[0])))
    n_packs = sum(micro_steps) * n_ranks
    return {
        "ranks": n_ranks,
        "micro_steps_a_step": float(np.mean(micro_steps)) if micro_steps else 0.0,
        "fill": tokens / (n_packs * config.batch.max_tokens) if n_packs else 0.0,
        "balance": tokens / (heaviest * n_ranks) if heaviest else 0.0,
    }
