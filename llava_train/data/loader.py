"""Steps of packed batches, read ahead by worker processes.

In order: the samples of a step (order) -> encoded, on every rank alike, since lengths decide the packs (chat)
-> packs for all ranks (packing) -> this rank decodes the images of its own packs (images) -> one
`PackedBatch` a micro-step. A sample that cannot be read keeps the ranks in step: one that is bad before
packing is left out by every rank, an image that turns out bad afterwards is replaced by a blank one and its
sample has no supervised token. Either way a `BadSample` says so.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_train.data.chat import IGNORED, ChatEncoder, EncodedSample
from llava_train.data.feature_cache import FeatureCache, FeatureError
from llava_train.data.images import ImagePreprocessor, decode_image
from llava_train.data.mixture import Mixture, Place
from llava_train.data.order import step_samples
from llava_train.data.packing import plan_packs
from llava_train.data.pictures import Picture
from llava_train.data.problems import SampleError
from llava_train.data.samples import Sample
from llava_train.onednn import next_size

T = TypeVar("T")

_NOT_FOR_WORKERS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class BadSample:
    """A sample that a step did not train on."""

    step: int
    source: str
    """Path of the source."""
    index: int
    """In the source."""
    line: int | None
    """In the source's file, counted from 1."""
    id: str
    kind: str
    """One of `problems.KINDS`."""
    reason: str
    on_every_rank: bool
    """Whether every rank reports it, not only the one that decodes its images."""

    @property
    def place(self) -> str:
        """Where it is in the source, in words."""
        return f"number {self.index}" + (f", line {self.line}" if self.line else "")

    @property
    def over_long(self) -> bool:
        """Whether `batch.over_long` decides what happens, not `on_bad_sample`."""
        return self.kind == "over_long"


@dataclass(frozen=True)
class PackedBatch:
    """One pack: D documents of T tokens in all, end to end.

    For documents of 3 and 2 tokens, the tokens 1, 2 and 4 supervised:
    position_ids [0,1,2,0,1], cu_seqlens [0,3,5], max_seqlen 3, predictors [0,1,3], targets ids[[1,2,4]].
    """

    input_ids: torch.Tensor  # int64 [1, T]
    labels: torch.Tensor  # int64 [1, T]; -100 where not supervised
    position_ids: torch.Tensor  # int64 [1, T]; restart at each document
    cu_seqlens: torch.Tensor  # int32 [D + 1]; document borders
    lengths: tuple[int, ...]  # tokens of each document
    pixel_values: torch.Tensor | None  # float32 [N, 3, H, W]; one blank image when there is none; None with features
    n_images: int  # 0 when there is only that blank image
    predictors: torch.Tensor  # int64 [S]; positions whose next token is supervised
    targets: torch.Tensor  # int64 [S]; those next tokens
    sources: torch.Tensor  # int64 [S]; number of the source that each target comes from
    features: torch.Tensor | None = None  # [N, image tokens, features]; in place of pixel_values, from a FeatureCache

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def n_supervised(self) -> int:
        return len(self.targets)

    def model_inputs(self) -> dict[str, Any]:
        """What `model.loss.PackedLoss` takes."""
        names = ("input_ids", "position_ids", "pixel_values", "features", "n_images", "cu_seqlens", "lengths")
        return {name: getattr(self, name) for name in (*names, "predictors", "targets")}

    def to(self, device: torch.device) -> PackedBatch:
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self._each_tensor(lambda tensor: tensor.pin_memory())

    def _each_tensor(self, change: Any) -> PackedBatch:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    step: int
    micro_batches: tuple[PackedBatch, ...]
    n_samples: tuple[int, ...]
    """Samples of the step by source, over all ranks, less those that were bad before their images were decoded."""
    bad_samples: tuple[BadSample, ...]
    samples: tuple[tuple[str, str], ...] = ()
    """Path of the source and id of each of these samples."""

    @property
    def n_supervised(self) -> int:
        """Supervised tokens of this rank."""
        return sum(batch.n_supervised for batch in self.micro_batches)

    @property
    def n_tokens(self) -> int:
        """Tokens of this rank, image tokens included."""
        return sum(batch.input_ids.numel() for batch in self.micro_batches)

    @property
    def n_images(self) -> int:
        """Images of this rank."""
        return sum(batch.n_images for batch in self.micro_batches)

    def pin_memory(self) -> StepBatch:
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))


@dataclass(frozen=True)
class Encoded:
    """A sample and its tokens, on the way to a pack."""

    place: Place
    sample: Sample
    tokens: EncodedSample


class StepDataset(Dataset[StepBatch]):
    """`dataset[step]` is that step's work for one rank.

    Args:
        seed: decides the order; None keeps the order of the sources (evaluation).
        attention_cost: see `packing.sample_cost`.
        features: where the features of all pictures are; pictures are then not decoded.
        few_sizes: fill packs up to one of a few sizes, see `onednn`.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: ChatEncoder,
        preprocessor: ImagePreprocessor,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int | None,
        rank: int = 0,
        n_ranks: int = 1,
        packing: bool = True,
        attention_cost: float = 0.0,
        features: FeatureCache | None = None,
        few_sizes: bool = False,
    ) -> None:
        self.features, self.few_sizes = features, few_sizes
        self.mixture, self.encoder, self.preprocessor = mixture, encoder, preprocessor
        self.batch_size, self.max_tokens, self.packing = batch_size, max_tokens, packing
        self.seed, self.rank, self.n_ranks, self.attention_cost = seed, rank, n_ranks, attention_cost

    def __getitem__(self, step: int) -> StepBatch:
        encoded, bad = self._encode(step)
        packs: list[list[int]] = [[]]
        if encoded:
            lengths = [item.tokens.n_tokens for item in encoded]
            plan = plan_packs(lengths, self.n_ranks, self.max_tokens, self.attention_cost, self.packing)
            packs = plan[self.rank]
        micro_batches = []
        for pack in packs:
            batch, bad_images = self._collate(step, [encoded[i] for i in pack])
            micro_batches.append(batch)
            bad += bad_images
        from_sources = [item.place.source_number for item in encoded]
        n_samples = tuple(np.bincount(from_sources, minlength=len(self.mixture.sources)).tolist())
        samples = tuple((item.place.source.path, item.sample.id) for item in encoded)
        return StepBatch(step, tuple(micro_batches), n_samples, tuple(bad), samples)

    def _encode(self, step: int) -> tuple[list[Encoded], list[BadSample]]:
        """The readable samples of a step, and the others. The same on every rank."""
        encoded, bad = [], []
        for index in self._indices(step):
            place = self.mixture.locate(index)
            try:
                sample = place.source[place.index]
                encoded.append(Encoded(place, sample, self.encoder.encode(sample)))
            except SampleError as error:
                bad.append(bad_sample(step, place, error, on_every_rank=True))
        return encoded, bad

    def _indices(self, step: int) -> list[int]:
        n_samples = len(self.mixture)
        if self.seed is None:
            return list(range(step * self.batch_size, min((step + 1) * self.batch_size, n_samples)))
        return step_samples(step, self.seed, n_samples, self.batch_size).tolist()

    def _collate(self, step: int, items: Sequence[Encoded]) -> tuple[PackedBatch, list[BadSample]]:
        """Packs samples. Images that cannot be decoded become blank and their samples unsupervised."""
        documents, pixels, bad = [], [], []
        blank = self.preprocessor.blank() if self.features is None else self.features.blank()
        for item in items:
            tokens = item.tokens
            try:
                images = [self._image(picture) for picture in item.sample.images[: tokens.n_images]]
            except SampleError as error:
                images = [blank] * tokens.n_images
                tokens = replace(tokens, labels=np.full_like(tokens.labels, IGNORED))
                bad.append(bad_sample(step, item.place, error, on_every_rank=False))
            documents.append(tokens)
            pixels += images
        numbers = [item.place.source_number for item in items]
        fill_up_to = self.max_tokens if self.few_sizes else None
        batch = pack_documents(documents, pixels, blank, self._filler(), numbers, fill_up_to)
        if self.features is not None:
            batch = replace(batch, pixel_values=None, features=batch.pixel_values)
        return batch, bad

    def _image(self, picture: Picture) -> torch.Tensor:
        """Pixels or features of a picture. Raises SampleError."""
        if self.features is not None:
            return self.features.of_picture(picture)
        return self.preprocessor(decode_image(picture))

    def _filler(self) -> EncodedSample:
        """A document for a rank that has none: two unsupervised tokens."""
        input_ids = np.full(2, self.encoder.end_of_turn_id(), dtype=np.int64)
        return EncodedSample(input_ids, np.full_like(input_ids, IGNORED), n_images=0)


def bad_sample(step: int, place: Place, error: SampleError, on_every_rank: bool) -> BadSample:
    """What is to be said of a sample that cannot be trained on."""
    source, index = place.source, place.index
    known = source.path, index, source.line(index), source.record_id(index)
    return BadSample(step, *known, error.kind, str(error), on_every_rank)


def filler_lengths(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Return the lengths of the documents that fill a pack up to one of a few sizes (`onednn`).

    None is longer than the longest of the pack, whose positions the language model is known to have.

    Args:
        lengths: tokens of each document of the pack, at least one.
        max_tokens: most tokens in a pack, fillers included.
    """
    n_missing, longest = next_size(sum(lengths), max_tokens) - sum(lengths), max(lengths)
    return [min(longest, n_missing - start) for start in range(0, n_missing, longest)]


def pack_documents(
    documents: Sequence[EncodedSample],
    pixels: Sequence[torch.Tensor],
    blank: torch.Tensor,
    filler: EncodedSample,
    source_numbers: Sequence[int],
    fill_up_to: int | None = None,
) -> PackedBatch:
    """Joins documents into one pack; `filler` stands in when there is none, `blank` when there is no image.

    Args:
        fill_up_to: most tokens in a pack. It is filled, with documents that teach nothing, up to one of a few sizes.
    """
    if not documents:
        documents, source_numbers = [filler], [0]
    elif fill_up_to is not None:
        fillers = filler_lengths([document.n_tokens for document in documents], fill_up_to)
        documents = [*documents, *(_of_length(filler, n_tokens) for n_tokens in fillers)]
        source_numbers = [*source_numbers, *[0] * len(fillers)]
    lengths = tuple(document.n_tokens for document in documents)
    labels = torch.from_numpy(np.concatenate([document.labels for document in documents]))
    predictors = (labels[1:] != IGNORED).nonzero().squeeze(1)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([document.input_ids for document in documents]))[None],
        labels=labels[None],
        position_ids=torch.cat([torch.arange(n_tokens) for n_tokens in lengths])[None],
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        lengths=lengths,
        pixel_values=torch.stack(list(pixels) or [blank]),
        n_images=len(pixels),
        predictors=predictors,
        targets=labels[predictors + 1],
        sources=torch.from_numpy(np.repeat(source_numbers, lengths))[predictors],
    )


def _of_length(filler: EncodedSample, n_tokens: int) -> EncodedSample:
    """The filler's tokens again and again."""
    return replace(filler, input_ids=np.resize(filler.input_ids, n_tokens), labels=np.resize(filler.labels, n_tokens))


def first_pictures(dataset: StepDataset, n_pictures: int, n_steps: int) -> list[torch.Tensor]:
    """Pixels [N, 3, H, W] of the first packs with pictures: `n_pictures` or a few more, if `n_steps` have them."""
    found: list[torch.Tensor] = []
    for step in range(n_steps):
        for pack in dataset[step].micro_batches:
            if sum(map(len, found)) >= n_pictures:
                return found
            if pack.n_images and pack.pixel_values is not None:
                found.append(pack.pixel_values)
    return found


def read_steps(dataset: Dataset[T], steps: range, n_workers: int, pin_memory: bool) -> Generator[T, None, None]:
    """Yields `dataset[step]` in order, read ahead by worker processes (`n_workers` 0: in this process).

    Close it, or the process may never end: its workers run until then.

    Raises:
        FeatureError: on one rank alone, see `FeatureCache.of_picture`.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=min(n_workers, len(steps)),
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
    )
    held_before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        batches = iter(loader)  # starts the workers; `_prepare_worker` lets their signals go
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_before)
    try:
        yield from batches
    except FeatureError as error:  # torch puts a worker's traceback before what it says
        told = FeatureError(str(error).strip().rpartition(f"{FeatureError.__name__}: ")[2])
        told.on_every_rank = False
        raise told from None
    finally:
        # A process waits for its workers before it ends, and they for it. Tracebacks keep torch's own end from coming.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _prepare_worker(worker: int) -> None:
    """Workers are the parallelism: threads inside them would fight over the cores.

    Launchers signal whole process groups, and a rank that shall save first needs its workers until then. They end with
    it: when it closes the loader, or when they find it gone.
    """
    torch.set_num_threads(1)
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)
