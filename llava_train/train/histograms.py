"""How long samples are and how full packs: counts in bins of equal width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

N_LENGTHS, N_FILLS = 32, 10


@dataclass(frozen=True)
class Histograms:
    """Of the samples and packs of some steps."""

    sample_lengths: tuple[int, ...] = (0,) * N_LENGTHS
    """Samples by their tokens, of batch.max_sample_tokens."""
    pack_fill: tuple[int, ...] = (0,) * N_FILLS
    """Packs by their tokens, of batch.max_tokens."""

    def __add__(self, other: Histograms) -> Histograms:
        both = zip(self.rows(), other.rows(), strict=True)
        return Histograms(*(tuple(a + b for a, b in zip(*rows, strict=True)) for rows in both))

    def rows(self) -> tuple[Sequence[int], Sequence[int]]:
        return self.sample_lengths, self.pack_fill


def counts_in_bins(numbers: Iterable[int], most: int, n_bins: int) -> tuple[int, ...]:
    """How many of the numbers are in each bin: i * width < number <= (i + 1) * width, where n_bins * width = most.

    Of 1, 50, 51 and 100 with most 100 and two bins: (2, 2).
    """
    counts = Counter((number * n_bins - 1) // most for number in numbers)
    return tuple(counts[index] for index in range(n_bins))
