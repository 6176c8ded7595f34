"""`LLaVA`: a model to ask about pictures.

    llava = LLaVA.from_pretrained("runs/llava-1.5-7b-stage2")
    llava.generate_from_image("dog.jpg", "What can you see in this image?")

A question is turns and pictures; the turns hold `<image>` where a picture goes, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias
from warnings import warn

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_train.config import ImageSection, ModelSection
from llava_train.data.chat import IGNORED
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.devices import cast_parameters, pick_device, pick_dtype
from llava_train.errors import Note, UserError
from llava_train.model.build import Llava, build_llava
from llava_train.model.processor import load_vision_config
from llava_train.refusals import validated
from llava_train.use.generation import Prompt, Sampling, answers_of, model_inputs, stream_answer
from llava_train.use.images import ImageLike, read_image
from llava_train.use.loading import load_llava, quantized
from llava_train.use.projectors import load_projector, settings_of_projector
from llava_train.use.prompts import Prompts
from llava_train.user_paths import expand

Precision: TypeAlias = Literal["auto", "bf16", "fp16", "fp32"] | torch.dtype
Quantization = Literal["4bit", "8bit"]

_FRESH_PROJECTOR = (
    "the projector between vision_model_path and language_model_path has learnt nothing: answers will be empty or say "
    "nothing about the picture; give a trained one (projector='runs/NAME' of stage 1, or an mm_projector.bin), or load "
    "a trained model with LLaVA.from_pretrained"
)


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer.

    `turns` end with a user's. Their texts hold `<image>` once for each of `images`, in order.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageLike, ...] = ()


def question_about(images: ImageLike | Sequence[ImageLike] | None, text: str, system: str | None = None) -> Question:
    """A question of one turn, its pictures before the text unless the text holds `<image>` for each of them."""
    listed = _listed(images)
    turns = (Turn("system", system),) if system else ()
    return Question((*turns, Turn("user", _with_placeholders(text, len(listed)))), listed)


class LLaVA:
    """A LLaVA model with its processor, ready to answer.

    Args:
        vision_model_path: hub id or folder of a CLIP, SigLIP or DINOv2 encoder.
        language_model_path: hub id or folder of a causal language model.
        device: `auto` for a GPU where there is one.
        dtype: `auto` for bfloat16 on a GPU, float32 elsewhere.
        chat_template: name or jinja file; `auto` for the one that the language model was trained with.
        projector: a trained one: a run of stage 1, an `mm_projector.bin`, a folder with one, or a hub id. Its run, or
            the `config.json` beside it, says which features of the vision tower it takes. None for a fresh one, which
            has learnt nothing: answers then say nothing about a picture, and a warning says so.

    Raises:
        UserError: parts that are missing or cannot be joined, or a device that is not there.
    """

    def __init__(
        self,
        vision_model_path: str | Path,
        language_model_path: str | Path,
        device: str = "auto",
        *,
        dtype: Precision = "auto",
        chat_template: str = "auto",
        projector: str | Path | None = None,
    ) -> None:
        """Joins parts with a projector between them."""
        place = pick_device(device)
        projector = None if projector is None else expand(str(projector))
        trained, image = ({}, ImageSection()) if projector is None else settings_of_projector(str(projector))
        vision_tower = expand(str(vision_model_path))
        has_class_token = not load_vision_config(vision_tower)[0].model_type.startswith("siglip")
        section = validated(
            ModelSection,
            language_model=str(language_model_path),
            vision_tower=vision_tower,
            chat_template=chat_template,
            **{"vision_feature_select": "patch" if has_class_token else "full", **trained},
        )
        natural = torch.bfloat16 if place.type == "cuda" else torch.float32
        llava = build_llava(section, image, pick_dtype(dtype, natural, place))
        if projector is None:
            warn(_FRESH_PROJECTOR, Note, stacklevel=2)
        else:
            load_projector(str(projector), llava, section)
        llava.processor.chat_template = load_template(section.chat_template, llava.tokenizer)
        llava.model.model.language_model.set_attn_implementation("sdpa")
        self._hold(llava, place, dtype, f"{vision_model_path} + {language_model_path}")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        *,
        dtype: Precision = "auto",
        quantization: Quantization | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> LLaVA:
        """Loads a run folder, its `model/`, a LoRA run, an original LLaVA checkpoint, or any llava-hf model.

        Args:
            dtype: `auto` for that of the weights, or float32 where the device is slow in it.
            quantization: the language model in 4 (NF4) or 8 bits, by bitsandbytes, on CUDA.
            chat_template: name or jinja file; None for the model's own, `vicuna_v1` where it has none.
            trust_remote_code: run Python code that the model brings along.

        Raises:
            UserError: no finished model there, or a device that is not there.
        """
        place = pick_device(device)
        settings = {} if quantization is None else quantized(quantization, place)
        wanted = None if dtype == "auto" else pick_dtype(dtype, torch.float32, place)
        llava = load_llava(name, wanted, chat_template=chat_template, trust_remote_code=trust_remote_code, **settings)
        self = cls.__new__(cls)
        self._hold(llava, None if quantization else place, dtype, str(name))
        return self

    def _hold(self, llava: Llava, place: torch.device | None, dtype: Precision, name: str) -> None:
        if place is not None:
            cast_parameters(llava.model.to(place), pick_dtype(dtype, llava.model.dtype, place))
        self._llava, self.name = llava, name
        self._prompts = Prompts(llava)
        self._preprocess = ImagePreprocessor(llava.processor.image_processor)

    @property
    def model(self) -> LlavaForConditionalGeneration:
        return self._llava.model

    @property
    def ignores_question(self) -> bool:
        """Whether its chat template leaves the question out, as stage 1's does."""
        return self._prompts.ignores_question

    @property
    def processor(self) -> LlavaProcessor:
        return self._llava.processor

    @property
    def device(self) -> torch.device:
        return self._llava.model.device

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
        """The answer to a question about one or several pictures.

        Args:
            settings: fields of `Sampling`: `max_new_tokens=64, temperature=0.7`.

        Raises:
            UserError: a picture that cannot be read, or a question that cannot be asked.
        """
        asked = self._about(image, question, system)
        return self.generate([asked], sampling=sampling, allow_urls=allow_urls, **settings)[0]

    def generate(
        self,
        questions: Sequence[Question | tuple[ImageLike | Sequence[ImageLike] | None, str]],
        *,
        sampling: Sampling | None = None,
        batch_size: int = 8,
        allow_urls: bool = False,
        **settings: Any,
    ) -> list[str]:
        """Answers in the order of the questions, computed in batches with padding on the left.

        Args:
            questions: or pairs of a picture and a text.
            settings: fields of `Sampling`.

        Raises:
            UserError: a picture that cannot be read, or a question that cannot be asked.
        """
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is out of range; wanted 1 or more")
        chosen = _sampling(sampling, settings)
        asked = [self._question(question) for question in questions]
        answers: list[str] = []
        for start in range(0, len(asked), batch_size):
            prompts = [self.prompt(question, allow_urls) for question in asked[start : start + batch_size]]
            answers += answers_of(self._llava, self._prompts, prompts, chosen)
        return answers

    def stream(
        self, question: Question, *, sampling: Sampling | None = None, allow_urls: bool = False, **settings: Any
    ) -> Iterator[str]:
        """The answer in pieces, as they are made. Closing the iterator stops the generation.

        Raises:
            UserError: a picture that cannot be read, or a question that cannot be asked.
        """
        prompt = self.prompt(question, allow_urls)
        return stream_answer(self._llava, self._prompts, prompt, _sampling(sampling, settings))

    @torch.inference_mode()
    def log_likelihoods(
        self, question: Question, answers: Sequence[str], *, allow_urls: bool = False
    ) -> list[tuple[float, int]]:
        """For each answer the sum of its tokens' log-probabilities (end of turn included), and their number.

        Raises:
            UserError: a picture that cannot be read, or a text that cannot be asked or answered.
        """
        if isinstance(answers, str):
            raise UserError("log_likelihoods takes a list of answers, not one text")
        if not answers:
            return []
        pixels = self._pixels(question, allow_urls)
        encoded = [self._prompts.encode_answer(question.turns, len(question.images), answer) for answer in answers]
        inputs = model_inputs(self._llava, [Prompt(input_ids, pixels) for input_ids, _ in encoded])
        logits = self.model(**inputs).logits
        found = []
        for row, (input_ids, labels) in enumerate(encoded):
            is_answer = torch.from_numpy(labels[1:] != IGNORED).to(logits.device)
            predicted = logits[row, -len(input_ids) : -1][is_answer].float().log_softmax(dim=-1)
            targets = torch.from_numpy(labels[1:]).to(logits.device)[is_answer]
            likelihoods = predicted.gather(1, targets[:, None])
            found.append((float(likelihoods.sum()), len(targets)))
        return found

    def chat(self, system: str | None = None, *, allow_urls: bool = False) -> Chat:
        """A new conversation."""
        return Chat(self, system, allow_urls)

    def prompt(self, question: Question, allow_urls: bool = False) -> Prompt:
        """Token ids and pixels of a question. Raises UserError."""
        input_ids = self._prompts.encode(question.turns, len(question.images))
        return Prompt(input_ids, self._pixels(question, allow_urls))

    def _question(self, question: Any) -> Question:
        if isinstance(question, Question):
            return question
        if isinstance(question, tuple | list) and len(question) == 2:
            return self._about(*question)
        raise UserError(f"a question is a Question or a pair of a picture (or None) and a text, not {question!r:.80}")

    def _about(self, images: ImageLike | Sequence[ImageLike] | None, text: str, system: str | None = None) -> Question:
        """What a person asks, who means something by it. (In data, a picture alone may be the question.)"""
        question = question_about(images, text, system)
        if not text.replace(IMAGE_PLACEHOLDER, "").strip() and not self.ignores_question:
            raise UserError("the question is empty; ask something about the picture")
        return question

    def _pixels(self, question: Question, allow_urls: bool) -> torch.Tensor | None:
        pictures = [read_image(image, allow_urls) for image in question.images]
        return torch.stack([self._preprocess(picture) for picture in pictures]) if pictures else None


class Chat:
    """A conversation of several turns. What failed is not kept, so that it can be asked again."""

    def __init__(self, llava: LLaVA, system: str | None = None, allow_urls: bool = False) -> None:
        self._llava, self._allow_urls = llava, allow_urls
        self.turns: list[Turn] = [Turn("system", system)] if system else []
        self.images: list[Image.Image] = []

    def ask(self, text: str, images: ImageLike | Sequence[ImageLike] = (), **settings: Any) -> str:
        """The answer; question and answer become part of the conversation. Raises UserError."""
        return "".join(self.stream(text, images, **settings))

    def stream(self, text: str, images: ImageLike | Sequence[ImageLike] = (), **settings: Any) -> Iterator[str]:
        """The same in pieces. An answer that is not read to its end is kept as far as it was read. Raises UserError."""
        listed = tuple(read_image(image, self._allow_urls) for image in _listed(images))  # once, for all turns to come
        (turn,) = self._llava._about(listed, text).turns
        question = Question((*self.turns, turn), (*self.images, *listed))
        pieces = self._llava.stream(question, allow_urls=self._allow_urls, **settings)
        return self._keeping(turn, listed, pieces)

    def _keeping(self, turn: Turn, images: tuple[Image.Image, ...], pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns += [turn, Turn("assistant", answer)]
                self.images += images


def _listed(images: ImageLike | Sequence[ImageLike] | None) -> tuple[ImageLike, ...]:
    if images is None:
        return ()
    return tuple(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else (images,)


def _sampling(sampling: Sampling | None, settings: dict[str, Any]) -> Sampling:
    try:
        return replace(sampling or Sampling(), **settings)
    except TypeError as error:
        raise UserError(f"{error}; known are: {', '.join(field.name for field in fields(Sampling))}") from None


def _with_placeholders(text: str, n_images: int) -> str:
    if not isinstance(text, str):
        raise UserError(f"a question is a text, not {type(text).__name__}")
    return text if IMAGE_PLACEHOLDER in text else f"{IMAGE_PLACEHOLDER}\n" * n_images + text
