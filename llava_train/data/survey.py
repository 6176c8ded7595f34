"""A look at some records before a run: do they have pictures, where the stage needs pictures?

A projector that trains on texts alone has a gradient of zero, and nothing else of the run shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llava_train.config import Part
from llava_train.data.formats import picture_markup
from llava_train.data.mixture import Mixture
from llava_train.data.problems import DataError, SampleError

N_RECORDS = 1000
"""Most records to look at: about 0.1 s of JSON."""


@dataclass(frozen=True)
class Survey:
    """Counts over the samples that were looked at and could be read."""

    n_samples: int
    n_with_pictures: int
    n_with_markup: int
    """Samples without a picture whose text has markup of one."""


def spaced_indices(n_samples: int, most: int = N_RECORDS) -> np.ndarray:
    """At most `most` evenly spaced indices of `n_samples`, the first and the last among them: int64, ascending."""
    return np.unique(np.linspace(0, n_samples - 1, min(n_samples, most)).round().astype(np.int64))


def survey(mixture: Mixture) -> Survey:
    """Reads up to `N_RECORDS` evenly spaced records of a mixture, without their pictures. Bad ones are passed over."""
    n_samples = n_with_pictures = n_with_markup = 0
    for index in spaced_indices(len(mixture)).tolist():
        try:
            sample = mixture[index]
        except SampleError:
            continue
        n_samples += 1
        n_with_pictures += bool(sample.images)
        n_with_markup += picture_markup(sample) is not None
    return Survey(n_samples, n_with_pictures, n_with_markup)


def refuse_without_pictures(found: Survey, trained: set[Part]) -> None:
    """Refuses a stage that trains the projector on texts alone. Raises DataError.

    Args:
        trained: the parts that train.
    """
    if "projector" in trained and found.n_samples and not found.n_with_pictures:
        raise DataError(
            f"data: none of the {found.n_samples:,} samples that were looked at has a picture, so the projector would "
            'learn nothing; name the pictures "image" or "images" in the records (see `llava-train check`), or remove '
            "trainable.projector to train on texts alone"
        )


def warnings_of(found: Survey, trained: set[Part]) -> Iterator[str]:
    """Yields what a user may not have meant, in sentences."""
    n_texts = found.n_samples - found.n_with_pictures
    if trained == {"projector"} and n_texts:
        yield (
            f"data: {n_texts / found.n_samples:.1%} of {found.n_samples:,} samples have no picture; a stage that "
            "trains only the projector learns nothing from them"
        )
    if found.n_with_markup:
        yield (
            f"data: {found.n_with_markup:,} of {found.n_samples:,} samples have no picture, but markup of one in the "
            'text, such as ![](a.png); it is trained on as letters. Name the picture "image" in the record to show it'
        )
