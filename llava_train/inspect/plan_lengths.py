"""The lengths of a stage's samples: measured where the data are there, assumed where they are not yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_train.config import SourceSection, StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.lengths import MOST_MEASURED, Longest, SampleLengths, longest_of, measure, samples_of_run
from llava_train.data.mixture import Mixture, open_mixture, taken
from llava_train.data.problems import DataError
from llava_train.errors import UserError
from llava_train.model.processor import Front

PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "llava_instruct_158k.json": 157_712,
    "llava_instruct_150k.json": 157_712,
}
"""Numbers of samples of published data files, for plans made before the download."""
_N_MEASURED = 2000
_CAPTION, _CONVERSATION = (25, 0.4), (250, 0.8)
"""Assumed text tokens of a sample: median, and deviation of the logarithm."""
_TEXT_ONLY, _SUPERVISED = 0.06, 0.4
"""Assumed shares: of conversations without a picture (as mix665k), and of text tokens that are supervised."""


class PlanError(UserError):
    """What was asked of a plan is not understood."""


@dataclass(frozen=True)
class Lengths(SampleLengths):
    """Samples of a stage: some of them, or all."""

    n_samples: int | None
    """Of an epoch; None where it is not known."""
    origin: str
    """Where the numbers come from, in words."""
    longest: Longest | None = None
    """Where all samples of the run were measured."""
    numbers: np.ndarray | None = None
    """Which samples these are, ascending, where they are all of the run."""


def find_lengths(config: StageConfig, front: Front) -> Lengths:
    """Lengths of the samples of a stage, measured on all or some of them; assumed where some data are not there yet.

    Raises DataError as the run would, where data are there and cannot be used.
    """
    try:
        mixture = open_mixture(config.data, config.seed, config.cache_dir)
    except DataError as error:
        there = [_with_what_is_there(source) for source in config.data if Path(source.path).exists()]
        told_by_hub = error.__cause__ is not None and not isinstance(error.__cause__, OSError)
        if there == config.data or told_by_hub:
            raise
        if there:
            open_mixture(there, config.seed, config.cache_dir)
        return assume_lengths(config, front.n_image_tokens, str(error).split(";")[0])
    if not len(mixture):
        raise PlanError("data: holds no sample")
    template, batch = load_template(config.model.chat_template, front.tokenizer), config.batch
    encoder = ChatEncoder(front.tokenizer, template, front.n_image_tokens, batch.max_sample_tokens, batch.over_long)
    return measure_lengths(config, mixture, encoder)


def _with_what_is_there(source: SourceSection) -> SourceSection:
    """A source whose samples are on the disk, without its pictures where some of them are not."""
    images = source.images.values() if isinstance(source.images, dict) else [source.images or source.path]
    missing = not all(Path(path).exists() for path in images)
    return source.model_copy(update={"images": None}) if missing else source


def measure_lengths(config: StageConfig, mixture: Mixture, encoder: ChatEncoder) -> Lengths:
    """Encodes all samples that the run trains on, if they are few, else 2,000 over the whole of the data.

    Those that cannot be read have 0 tokens.
    """
    n_samples, numbers = len(mixture), samples_of_run(config, len(mixture))
    if len(numbers) > MOST_MEASURED:
        some = np.linspace(0, n_samples - 1, _N_MEASURED).round().astype(int)
        found = measure(mixture, encoder, some.tolist())
        return Lengths(**vars(found), n_samples=n_samples, origin=f"measured on {len(some):,} of {n_samples:,} samples")
    found = measure(mixture, encoder, numbers.tolist())
    of_all = "all" if len(numbers) == n_samples else f"the {len(numbers):,} that it trains on, of"
    origin = f"measured on {of_all} {n_samples:,} samples"
    return Lengths(
        **vars(found), n_samples=n_samples, origin=origin, longest=longest_of(found, config.batch.size), numbers=numbers
    )


def assume_lengths(config: StageConfig, n_image_tokens: int, why: str) -> Lengths:
    """Lengths where there are no data: captions with `plain`, else conversations, log-normal, one image a sample."""
    rng = np.random.default_rng(config.seed)
    is_caption = config.model.chat_template == "plain"
    median, deviation = _CAPTION if is_caption else _CONVERSATION
    n_text = rng.lognormal(np.log(median), deviation, _N_MEASURED).astype(np.int64) + 2
    n_images = (rng.random(_N_MEASURED) >= (0 if is_caption else _TEXT_ONLY)).astype(np.int64)
    n_tokens = np.minimum(n_text + n_images * n_image_tokens, config.batch.max_sample_tokens)
    share = 1.0 if is_caption else _SUPERVISED
    n_supervised = (np.maximum(n_tokens - n_images * n_image_tokens, 1) * share).astype(np.int64)
    counts = [_n_published(source, config.seed) for source in config.data]
    n_samples = sum(filter(None, counts)) if all(counts) else None
    kind = "captions" if is_caption else "conversations"
    origin = f"ASSUMED, {kind} of {median} text tokens (median), for {why}"
    if n_samples:
        origin += f"; {n_samples:,} samples, as published"
    return Lengths(n_tokens, n_supervised, n_images, n_samples, origin)


def _n_published(source: SourceSection, seed: int) -> int | None:
    """Samples that an epoch has of a published file, None of any other."""
    n_samples = PUBLISHED.get(Path(source.path).name.lower())
    return n_samples and len(taken(n_samples, source.take, seed))
