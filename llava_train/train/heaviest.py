"""The heaviest pack that a stage can have: what the estimate of memory and the dry run compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from llava_train.config import BatchSection
from llava_train.data.lengths import Longest
from llava_train.data.loader import PackedBatch
from llava_train.data.packing import sample_cost

_ROUNDING = 1e-9
"""Of the computed bound, so that a bound that is a whole number is not rounded below it."""


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
    batch: BatchSection,
    n_ranks: int,
    n_image_tokens: int,
    image_size: int,
    attention_cost: float = 0.0,
    longest: Longest | None = None,
) -> PackShape:
    """Returns a pack that none of a rank's packs exceeds, in tokens or in images, whatever samples a step draws.

    Args:
        attention_cost: see `packing.sample_cost`.
        longest: the greatest of the run's samples, where all were measured. Otherwise each sample of a step may have
            `max_sample_tokens`, and as many images as fit into them.

        size 4, max_tokens 100, max_sample_tokens 40, 1 rank, 16 image tokens -> documents of 40, 40, 20; 6 images
        the same, and no sample has more than 20 tokens and 1 image           -> documents of 20, 20, 20, 20; 4 images
    """
    images_a_sample = (batch.max_sample_tokens - 1) // n_image_tokens  # one token at least is supervised text
    if longest is None:
        longest = Longest((batch.max_sample_tokens,) * batch.size, (images_a_sample,) * batch.size)
    images_a_sample = longest.n_images[0]
    if not batch.packing:
        return PackShape(longest.n_tokens[:1], images_a_sample, n_image_tokens, image_size)
    n_samples = max(1, len(longest.n_tokens) - n_ranks + 1)  # no pack is empty where the samples are enough
    n_tokens = min(batch.max_tokens, _most_tokens(longest.n_tokens, n_ranks, n_samples, attention_cost))
    n_images = min(sum(longest.n_images[:n_samples]), _images_in(n_tokens, images_a_sample, n_image_tokens))
    return PackShape(_documents(longest.n_tokens, n_tokens), n_images, n_image_tokens, image_size)


def _most_tokens(longest: Sequence[int], n_ranks: int, n_samples: int, attention_cost: float) -> int:
    """Most tokens that a pack of `n_samples` can have, as long as `batch.max_tokens` does not limit it.

    `packing` gives each sample, the costliest first, to the pack that is cheapest so far. When a pack gets its last
    sample, some other pack has less than an even share of the samples (as a number) and costs at least as much. So the
    costliest pack costs at most as much as an even share of the costliest samples, and swaps make it no costlier. Of
    all packs of that cost, the one whose samples are equally long has the most tokens t: t + attention_cost * t^2 /
    n_samples is its cost.
    """
    share = -(-len(longest) // n_ranks)
    cost = sum(sample_cost(n_tokens, attention_cost) for n_tokens in longest[:share])
    curvature = attention_cost / n_samples
    by_cost = (math.sqrt(1 + 4 * curvature * cost) - 1) / (2 * curvature) if curvature else cost
    return min(sum(longest[:n_samples]), math.floor(by_cost * (1 + _ROUNDING)))


def _images_in(n_tokens: int, images_a_sample: int, n_image_tokens: int) -> int:
    """Most images in so many tokens, if each sample has at most `images_a_sample` and a token of text."""
    n_whole, rest = divmod(n_tokens, images_a_sample * n_image_tokens + 1)
    return n_whole * images_a_sample + max(0, rest - 1) // n_image_tokens


def _documents(longest: Sequence[int], n_tokens: int) -> tuple[int, ...]:
    """The longest samples, the last of them cut, that make up `n_tokens`."""
    ends = list(accumulate(longest))
    n_whole = sum(end <= n_tokens for end in ends)
    rest = n_tokens - sum(longest[:n_whole])
    return (*longest[:n_whole], *([rest] if rest else []))


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
