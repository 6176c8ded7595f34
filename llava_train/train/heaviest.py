"""The heaviest pack that a stage can have: what the estimate of memory and the dry run compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava_train.config import BatchSection
from llava_train.data.loader import PackedBatch
from llava_train.data.mixture import Mixture
from llava_train.data.problems import SampleError

_N_LOOKED_AT = 64


@dataclass(frozen=True)
class PackShape:
    """The size of a pack, without its content."""

    lengths: tuple[int, ...]
    """Tokens of each document."""
    n_images: int
    n_image_tokens: int
    """Of each image."""
    image_size: int
    """Side in pixels."""

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    def __str__(self) -> str:
        return f"{self.n_tokens:,} tokens, {self.n_images:,} images"


def heaviest_pack(
    batch: BatchSection, n_ranks: int, n_image_tokens: int, image_size: int, images_a_sample: int = 1
) -> PackShape:
    """As many tokens and images as a pack of a rank can hold.

    Packs are filled evenly, so a rank has at most its share of the step's samples, each of the greatest length.

    Args:
        images_a_sample: the most images that a sample has.

        size 4, max_tokens 100, max_sample_tokens 40, 1 rank, 16 image tokens -> documents of 40, 40, 20; 4 images
    """
    share = -(-batch.size // n_ranks) if batch.packing else 1
    n_tokens = min(batch.max_tokens, share * batch.max_sample_tokens)
    n_whole, rest = divmod(n_tokens, batch.max_sample_tokens)
    lengths = (batch.max_sample_tokens,) * n_whole + ((rest,) if rest else ())
    n_samples = batch.size if batch.packing else 1
    n_images = min(n_tokens // (n_image_tokens + 1), n_samples * images_a_sample)
    return PackShape(lengths, n_images, n_image_tokens, image_size)


def most_images(mixture: Mixture) -> int:
    """The most images of a sample, at least 1, among a few over the whole of the data."""
    numbers = range(0, len(mixture), max(1, len(mixture) // _N_LOOKED_AT))
    return max([1, *(_n_images(mixture, number) for number in numbers)])


def _n_images(mixture: Mixture, number: int) -> int:
    try:
        return len(mixture[number].images)
    except SampleError:
        return 0


def imitate(shape: PackShape, image_token: int, device: torch.device) -> PackedBatch:
    """A pack of that shape on the device, every token supervised: images first, then one text token again and again.

    Args:
        image_token: the id of `<image>`.
    """
    text_token = 0 if image_token else 1
    input_ids = torch.full((1, shape.n_tokens), text_token, device=device)
    input_ids[:, : shape.n_images * shape.n_image_tokens] = image_token
    n_supervised = shape.n_tokens - 1
    return PackedBatch(
        input_ids=input_ids,
        labels=input_ids,
        position_ids=torch.cat([torch.arange(length, device=device) for length in shape.lengths])[None],
        cu_seqlens=torch.tensor(_borders(shape.lengths), dtype=torch.int32, device=device),
        lengths=shape.lengths,
        pixel_values=torch.zeros(max(1, shape.n_images), 3, shape.image_size, shape.image_size, device=device),
        n_images=shape.n_images,
        predictors=torch.arange(n_supervised, device=device),
        targets=torch.full((n_supervised,), text_token, device=device),
        sources=torch.zeros(n_supervised, dtype=torch.int64, device=device),
    )


def _borders(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths) + 1)]
