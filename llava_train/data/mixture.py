"""Several sources as one data set of numbered samples, with how much each gives an epoch.

Sample `i` of a mixture is counted over all sources end to end; a source may give the same sample more than once an
epoch. Which samples a source gives is a pure function of its size, its `Take` and the seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from llava_train.config import SourceSection, Take
from llava_train.data.problems import DataError
from llava_train.data.samples import Sample
from llava_train.data.sources import Source, open_source


def taken(n_samples: int, take: Take, seed: int) -> np.ndarray:
    """Indices into a source of `n_samples` that an epoch has: int64, ascending, each `take.repeat` times end to end.

    A share is the same in every epoch: `Take(fraction=0.5)` of 4 samples may be [0, 2]. At least one sample is taken.
    """
    if take.fraction is not None:
        n_taken = max(1, round(take.fraction * n_samples))
        chosen = np.random.Generator(np.random.PCG64([seed, n_samples])).permutation(n_samples)[:n_taken]
        return np.sort(chosen)
    return np.tile(np.arange(min(take.first or n_samples, n_samples)), take.repeat)


@dataclass(frozen=True)
class Place:
    """Where a sample of a mixture comes from."""

    source: Source
    source_number: int
    index: int
    """In the source."""


class Mixture:
    """Sources end to end.

    Args:
        takes: how much of each; default: all.
        seed: decides which samples a share has.

    Raises:
        DataError: more samples asked for than there are.
    """

    def __init__(self, sources: Sequence[Source], takes: Sequence[Take] | None = None, seed: int = 0) -> None:
        self.sources = tuple(sources)
        takes = takes or [Take()] * len(self.sources)
        for source, take in zip(self.sources, takes, strict=True):
            if take.first is not None and take.first > len(source):
                raise DataError(f"{source.path}: take first {take.first:,}, but it holds {len(source):,} samples")
        self._taken = [taken(len(source), take, seed) for source, take in zip(self.sources, takes, strict=True)]
        self._ends = list(accumulate(map(len, self._taken)))

    def __len__(self) -> int:
        return self._ends[-1]

    def taken_of(self, number: int) -> np.ndarray:
        """Indices into source `number` that an epoch has: int64, see `taken`."""
        return self._taken[number]

    def locate(self, index: int) -> Place:
        """Where sample `index` comes from."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return Place(self.sources[number], number, int(self._taken[number][index - start]))

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError."""
        place = self.locate(index)
        return place.source[place.index]


def open_mixture(sections: Sequence[SourceSection], seed: int = 0, cache: Path | None = None) -> Mixture:
    """The sources of a stage file. `cache` as in `open_source`. Raises DataError."""
    sources: list[Source] = []
    for section in sections:
        settings = section.model_dump(include={"images", "name", "subset", "split"})
        source = open_source(section.path, **settings, cache=cache)
        names = {other.name for other in sources}
        if source.name in names and section.name:
            raise DataError(f"{section.path}: two sources are named {section.name!r}; give each a `name:` of its own")
        if source.name in names:
            source.name = next(name for n in range(2, len(names) + 3) if (name := f"{source.name}-{n}") not in names)
        sources.append(source)
    return Mixture(sources, [section.take for section in sections], seed)
