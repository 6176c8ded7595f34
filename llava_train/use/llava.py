"""`LLaVA`: a model to ask about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_train.data.samples import Turn

ImageLike: TypeAlias = str | Path | bytes | Image.Image
"""A picture: a file, its bytes, a decoded picture, or (where `allow_urls`) an http(s) address."""

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Quantization = Literal["4bit", "8bit"]


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen. Temperature 0 takes the most likely token each time."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Of the random draws; None draws anew each time."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer.

    `turns` end with a user's. Their texts hold `<image>` once for each of `images`, in order.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageLike, ...] = ()


class LLaVA:
    """A LLaVA model with its processor, ready to answer. Immutable: conversations are `Chat`s of their own."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    device: torch.device
    name: str

    def __init__(
        self,
        vision_model_path: str,
        language_model_path: str,
        device: Device = "auto",
        *,
        dtype: Precision = "auto",
        chat_template: str = "auto",
    ) -> None:
        """Joins untrained parts with a fresh projector."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: Device = "auto",
        *,
        dtype: Precision = "auto",
        quantization: Quantization | None = None,
        trust_remote_code: bool = False,
    ) -> LLaVA:
        """Loads a run folder, its `model/`, a LoRA run, an original LLaVA checkpoint, or any llava-hf model."""
        raise NotImplementedError

    def generate_from_image(
        self,
        image: ImageLike | Sequence[ImageLike],
        question: str,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        allow_urls: bool = False,
        **settings: Any,
    ) -> str:
        """The answer to a question about one or several pictures. `settings` are the fields of `Sampling`."""
        raise NotImplementedError

    def generate(
        self,
        questions: Sequence[Question | tuple[ImageLike | None, str]],
        *,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[str]:
        """Answers in the order of the questions, computed in batches with padding on the left."""
        raise NotImplementedError

    def stream(
        self,
        question: Question,
        *,
        sampling: Sampling | None = None,
        allow_urls: bool = False,
        **settings: Any,
    ) -> Iterator[str]:
        """The answer in pieces, as they are made. Closing the iterator stops the generation."""
        raise NotImplementedError

    def log_likelihoods(
        self, question: Question, answers: Sequence[str], *, allow_urls: bool = False
    ) -> list[tuple[float, int]]:
        """For each answer the sum of its tokens' log-probabilities (end of turn included), and their number."""
        raise NotImplementedError

    def chat(self, system: str | None = None, *, allow_urls: bool = False) -> Chat:
        """A new conversation."""
        raise NotImplementedError


class Chat:
    """A conversation of several turns."""

    turns: list[Turn]
    images: list[ImageLike]

    def ask(self, text: str, images: Sequence[ImageLike] = (), **settings: Any) -> str:
        """The answer; question and answer become part of the conversation."""
        raise NotImplementedError

    def stream(self, text: str, images: Sequence[ImageLike] = (), **settings: Any) -> Iterator[str]:
        """The same in pieces. An answer that is not read to its end is kept as far as it was read."""
        raise NotImplementedError


def question_about(images: ImageLike | Sequence[ImageLike] | None, text: str, system: str | None = None) -> Question:
    """A question of one turn, its images before the text unless the text holds `<image>` for each of them."""
    raise NotImplementedError
