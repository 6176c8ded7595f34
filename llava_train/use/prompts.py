"""Conversation -> the token ids that a model goes on from.

A model of ours carries the chat template that it was trained with, and is asked by the code that encoded its training
samples. A template from elsewhere (llava-hf) takes content as a list of parts, leaves the begin-of-sequence token to
the tokenizer, and marks no end of an answer.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import render
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.errors import UserError
from llava_train.model.build import Llava
from llava_train.template_marks import has_marks

_ANSWER = "answer"


class Prompts:
    """The prompts of a model, and where its answers end."""

    def __init__(self, llava: Llava) -> None:
        template = llava.processor.chat_template
        if not template:
            raise UserError("the model has no chat template, so nothing says how to ask it; export its run again")
        is_ours = _is_ours(template, llava.tokenizer)
        self.max_tokens = int(llava.model.config.text_config.max_position_embeddings)
        make = ChatEncoder if is_ours else _ForeignEncoder
        self._encoder = make(llava.tokenizer, template, llava.n_image_tokens, self.max_tokens)
        known = llava.model.generation_config.eos_token_id
        ends = list(known) if isinstance(known, list | tuple) else [known]
        ends = [self._encoder.end_of_turn_id() if is_ours else llava.tokenizer.eos_token_id, *ends]
        self.end_ids: list[int] = list(dict.fromkeys(token for token in ends if token is not None))
        self.stop_string: str | None = self._encoder.stop_string() if is_ours else None

    def encode(self, turns: tuple[Turn, ...], n_images: int) -> np.ndarray:
        """Token ids int64 [T] up to where the answer begins, images widened.

        Raises:
            SampleError: a control token or a wrong `<image>` in a text, or a prompt beyond what the model can read.
        """
        self._encoder.check_texts(turns, n_images)
        text, _ = self._render(turns, prompt=True)
        return self._within(self._encoder.tokenize(text, [], n_images)[0])

    @cached_property
    def ignores_question(self) -> bool:
        """Whether the template leaves the question out, as stage 1's `plain` does."""
        question = "Is it?"
        return question not in self._render((Turn("user", question),), prompt=True)[0]

    def encode_answer(self, turns: tuple[Turn, ...], n_images: int, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] and labels [T] of a conversation with an answer; -100 where nothing of the answer stands.

        Raises:
            SampleError: as `encode`.
        """
        answered = (*turns, Turn("assistant", answer))
        self._encoder.check_texts(answered, n_images)
        text, spans = self._render(answered, prompt=False)
        input_ids, labels = self._encoder.tokenize(text, spans[-1:], n_images)
        return self._within(input_ids), labels

    def _render(self, turns: tuple[Turn, ...], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._encoder.render(turns, prompt)
        except Exception as error:  # jinja passes on whatever the expressions of a template raise
            raise SampleError("template_refuses", f"the chat template refuses the conversation: {error}") from error

    def _within(self, input_ids: np.ndarray) -> np.ndarray:
        if len(input_ids) >= self.max_tokens:
            raise SampleError(
                "over_long",
                f"the conversation has {len(input_ids)} tokens, the model reads {self.max_tokens}",
            )
        return input_ids


class _ForeignEncoder(ChatEncoder):
    """Encodes by a chat template that was not made to train with."""

    def render(self, turns: tuple[Turn, ...], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Text, and the span of the last answer: what follows the prompt that asks for it."""
        text = self._text(turns, prompt)
        if turns[-1].role != "assistant":
            return text, []
        beginning = self._text(turns[:-1], True)
        return text, [(len(beginning), len(text.rstrip()))] if text.startswith(beginning) else []

    def _text(self, turns: tuple[Turn, ...], prompt: bool) -> str:
        tokenizer = self.tokenizer
        messages = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        text = str(
            tokenizer.apply_chat_template(
                messages, chat_template=self.template, add_generation_prompt=prompt, tokenize=False
            )
        )
        begin = tokenizer.bos_token if _adds_bos(tokenizer) else None
        return text if begin is None or text.startswith(begin) else begin + text


def _is_ours(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template marks an answer and what ends it in a conversation of texts, as templates to train with must.

    llava-hf's has marks, too, but it takes parts only, and marks no end.
    """
    if not has_marks(template):
        return False
    try:
        text, spans = render(template, tokenizer, (Turn("user", "Is it?"), Turn("assistant", _ANSWER)))
    except Exception:  # jinja passes on whatever the expressions of a template raise
        return False
    marked = [text[start:end] for start, end in spans]
    return len(marked) == 1 and bool(marked[0].partition(_ANSWER)[2].strip(" "))


def _parts(text: str) -> list[dict[str, Any]]:
    """`<image>\\nWhat?` as `[{"type": "image"}, {"type": "text", "text": "What?"}]`."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
