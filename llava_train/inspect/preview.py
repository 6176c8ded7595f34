"""What the model will see of the first steps: tokens, supervision, packs, and the picture as the encoder gets it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED, ChatEncoder, EncodedSample
from llava_train.data.images import ImagePreprocessor, decode_image
from llava_train.data.mixture import Place
from llava_train.data.order import step_samples
from llava_train.data.packing import plan_packs
from llava_train.data.problems import SampleError
from llava_train.data.samples import Sample
from llava_train.files import written_aside
from llava_train.inspect.opening import StageData
from llava_train.inspect.report import printable


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together and are alike: an image, supervised text, or other text."""

    text: str
    n_tokens: int
    supervised: bool = False
    is_image: bool = False


@dataclass(frozen=True)
class Seen:
    """A sample of the first steps as the model will see it; `problem` says why it will not."""

    place: Place
    id: str
    sample: Sample | None = None
    encoded: EncodedSample | None = None
    pieces: tuple[Piece, ...] = ()
    pixels: tuple[torch.Tensor, ...] = ()
    """float32 [3, H, W] of each image."""
    problem: str = ""

    def as_record(self) -> dict[str, Any]:
        """What `--json` prints."""
        known = {"id": self.id, "source": self.place.source.path, "index": self.place.index, "problem": self.problem}
        if self.encoded is None:
            return known
        ids, labels = self.encoded.input_ids.tolist(), self.encoded.labels.tolist()
        return {**known, "input_ids": ids, "labels": labels, "pieces": [vars(piece) for piece in self.pieces]}


def first_seen(config: StageConfig, data: StageData, n_samples: int) -> Iterator[Seen]:
    """The first samples in the order of training."""
    size, total = config.batch.size, len(data.mixture)
    for number in range(min(n_samples, total)):
        step, within = divmod(number, size)
        chosen = step_samples(step, config.seed, total, size)
        if within < len(chosen):
            yield see(data, data.mixture.locate(int(chosen[within])))


def see(data: StageData, place: Place) -> Seen:
    """One sample on its way to the model, as far as it comes."""
    name = place.source.record_id(place.index)
    try:
        sample = place.source[place.index]
        encoded = data.encoder.encode(sample)
        pixels = tuple(data.preprocessor(decode_image(picture)) for picture in sample.images[: encoded.n_images])
    except SampleError as error:
        return Seen(place, name, problem=str(error))
    return Seen(place, name, sample, encoded, tuple(pieces_of(encoded, data.encoder)), pixels)


def pieces_of(encoded: EncodedSample, encoder: ChatEncoder) -> Iterator[Piece]:
    """The tokens of a sample in words: runs of alike tokens, each image a run of its own.

    A run is decoded within all that stands before it, for a tokenizer may write a token otherwise at a beginning.
    """
    ids, is_image = encoded.input_ids, encoded.input_ids == encoder.image_token_id
    kinds = list(zip(is_image.tolist(), (encoded.labels != IGNORED).tolist(), strict=True))
    start, before = 0, ""
    for (image, supervised), run in groupby(kinds):
        n_tokens = len(list(run))
        if image:
            for _ in range(n_tokens // encoder.n_image_tokens):
                yield Piece(f"<image x{encoder.n_image_tokens}>", encoder.n_image_tokens, is_image=True)
        narrow = _narrowed(ids[: start + n_tokens], encoder)
        whole = encoder.tokenizer.decode(narrow, clean_up_tokenization_spaces=False)
        if not image:
            yield Piece(whole[len(before) :], n_tokens, supervised)
        start, before = start + n_tokens, whole


def _narrowed(ids: np.ndarray, encoder: ChatEncoder) -> list[int]:
    """Token ids with one token an image."""
    is_image = ids == encoder.image_token_id
    number = np.cumsum(is_image)
    return ids[~is_image | (number % encoder.n_image_tokens == (1 % encoder.n_image_tokens))].tolist()


def print_seen(console: Console, seen: Seen) -> None:
    """A sample in the terminal: supervised text in colour, the rest dim."""
    title = printable(f"{seen.id}  [{seen.place.source.name} {seen.place.index}]")
    if seen.encoded is None:
        console.print(Text(f"{title}  {printable(seen.problem)}", style="bold red"))
        return
    n_supervised = int((seen.encoded.labels != IGNORED).sum())
    console.print(Text(f"{title}  {seen.encoded.n_tokens} tokens, {n_supervised} supervised", style="bold"))
    text = Text()
    for piece in seen.pieces:
        style = "bold green" if piece.supervised else "cyan" if piece.is_image else "dim"
        text.append(printable(piece.text), style=style)
    console.print(text, end="\n\n")


def packs_of_first_step(config: StageConfig, data: StageData, n_ranks: int) -> list[list[list[tuple[str, int]]]]:
    """`packs[rank][micro_step]`: id and tokens of each sample."""
    chosen = step_samples(0, config.seed, len(data.mixture), config.batch.size).tolist()
    samples = []
    for index in chosen:
        place = data.mixture.locate(index)
        try:
            sample = place.source[place.index]
            samples.append((sample.id, data.encoder.encode(sample).n_tokens))
        except SampleError:
            continue
    if not samples:
        return []
    lengths = [n_tokens for _, n_tokens in samples]
    plan = plan_packs(lengths, n_ranks, config.batch.max_tokens, data.attention_cost, config.batch.packing)
    return [[[samples[i] for i in pack] for pack in packs] for packs in plan]


def write_page(config: StageConfig, data: StageData, samples: list[dict[str, Any]], n_ranks: int, path: Path) -> None:
    """A self-contained HTML page of samples that `for_page` prepared."""
    text = resources.files("llava_train.inspect").joinpath("preview.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(text)
    content = page.render(
        config=config,
        template=config.model.chat_template,
        samples=samples,
        ranks=packs_of_first_step(config, data, n_ranks),
        size=data.preprocessor.size,
    )
    with written_aside(path) as file:
        file.write(content)


def for_page(seen: Seen, preprocessor: ImagePreprocessor) -> dict[str, Any]:
    """What the page shows of a sample, its pictures small again: an encoded one takes a tenth of its pixel values."""
    encoded = seen.encoded
    return {
        "id": seen.id,
        "source": seen.place.source.name,
        "index": seen.place.index,
        "line": seen.place.source.line(seen.place.index),
        "problem": seen.problem,
        "pieces": seen.pieces,
        "n_tokens": encoded.n_tokens if encoded else 0,
        "n_supervised": int((encoded.labels != IGNORED).sum()) if encoded else 0,
        "truncated": bool(encoded and encoded.truncated),
        "images": [
            {"name": str(picture), "url": _data_url(preprocessor.denormalized(pixels))}
            for picture, pixels in zip(seen.sample.images if seen.sample else (), seen.pixels, strict=False)
        ],
    }


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
