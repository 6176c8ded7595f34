"""The lengths of samples, and the longest that one step can have.

A bound on a pack has to hold for every step of a run, so it may use measured lengths only where *all* samples of the
run were measured: among 2,000 of 600,000 samples the longest is hardly ever there. The order of samples is a pure
function, so those that a run trains on are known before it. Encoding one takes about a millisecond, so a run measures
them at its start where there are at most `MOST_MEASURED`. Larger runs are bounded by the keys of the stage file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED, ChatEncoder
from llava_train.data.mixture import Mixture
from llava_train.data.order import n_steps_of, step_samples
from llava_train.data.problems import SampleError

MOST_MEASURED = 5_000
"""Samples of a run up to which all of them are measured: a few seconds."""


@dataclass(frozen=True)
class SampleLengths:
    """Arrays by sample, int64; 0 where a sample cannot be trained on."""

    n_tokens: np.ndarray  # image tokens included
    n_supervised: np.ndarray
    n_images: np.ndarray


@dataclass(frozen=True)
class Longest:
    """The greatest of the samples that a run trains on, at most `batch.size` of them.

    The tokens and images of every step, sorted, are at most these, one by one.
    """

    n_tokens: tuple[int, ...]  # of the longest samples, descending
    n_images: tuple[int, ...]  # of the samples with the most images, descending


def samples_of_run(config: StageConfig, n_samples: int) -> np.ndarray:
    """Numbers of the samples that a run trains on, ascending: int64, all `n_samples` of an epoch or fewer."""
    size, schedule = config.batch.size, config.schedule
    n_used = n_steps_of(n_samples, size, schedule.epochs, schedule.max_steps) * size
    return np.sort(step_samples(0, config.seed, n_samples, min(n_used, n_samples)))


def measure(mixture: Mixture, encoder: ChatEncoder, numbers: Iterable[int]) -> SampleLengths:
    """Encodes the samples of these numbers."""
    rows = [_lengths(mixture, encoder, number) for number in numbers]
    return SampleLengths(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


def _lengths(mixture: Mixture, encoder: ChatEncoder, number: int) -> tuple[int, int, int]:
    try:
        encoded = encoder.encode(mixture[number])
    except SampleError:
        return 0, 0, 0
    return encoded.n_tokens, int((encoded.labels != IGNORED).sum()), encoded.n_images


def longest_of(lengths: SampleLengths, batch_size: int) -> Longest | None:
    """The greatest of measured samples. Those that cannot be trained on do not count; None where none can."""
    good = lengths.n_tokens > 0
    n_tokens, n_images = (np.sort(array[good])[::-1][:batch_size] for array in (lengths.n_tokens, lengths.n_images))
    return Longest(tuple(n_tokens.tolist()), tuple(n_images.tolist())) if good.any() else None


def measure_longest(config: StageConfig, mixture: Mixture, encoder: ChatEncoder) -> Longest | None:
    """Measures all samples that a run trains on; None where they are more than `MOST_MEASURED`."""
    numbers = samples_of_run(config, len(mixture))
    if len(numbers) > MOST_MEASURED:
        return None
    return longest_of(measure(mixture, encoder, numbers.tolist()), config.batch.size)
