"""Sample -> token ids and labels.

A sample is rendered once by the chat template and tokenized once. The template marks what the assistant says
with `{% generation %}`; the marks give character spans, the tokenizer gives each token's characters, and a
token is supervised exactly when it holds a character of a span. Then each `<image>` is widened to the number
of image tokens by repeating its id. For `chatml` and an image of 3 tokens:

    text    <|im_start|>user\\n<image>\\nWhat?<|im_end|>\\n<|im_start|>assistant\\nA cat<|im_end|>\\n
    ids     ... <image> <image> <image> ...                              A   cat   <|im_end|>   \\n
    labels  ... -100    -100    -100    ...                              A   cat   <|im_end|>  -100

The exported processor carries the same template, so that training and use cannot differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llava_train.data.samples import IMAGE_PLACEHOLDER, Sample, SampleError, Turn
from llava_train.errors import UserError

IGNORED = -100
"""Label of a token that is not supervised."""

_CONTROL_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}


class TemplateError(UserError):
    """A chat template that does not fit the tokenizer."""


@dataclass(frozen=True)
class EncodedSample:
    """Token ids and labels of a sample.

    `labels[t]` is `input_ids[t]` where token t is supervised, else -100; `labels[0]` is always -100, since
    nothing precedes it. `n_images` images are shown, in order; truncation may leave later ones out.
    """

    input_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    n_images: int
    truncated: bool = False

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja text of a chat template, fitted to a tokenizer.

    Where the tokenizer puts a begin-of-sequence token before a text, so does the template: chat front ends switch
    the tokenizer's own off. `plain` would begin with the image, which the language model would then take for its
    attention sink (Xiao et al., 2309.17453): it begins with that token wherever there is one.

    Raises:
        TemplateError: the tokenizer lacks a token that the template writes.
    """
    missing = [token for token in _CONTROL_TOKENS.get(name, ()) if token not in tokenizer.get_vocab()]
    if name == "vicuna_v1" and tokenizer.eos_token is None:
        missing = ["an end-of-sequence token"]
    if missing:
        raise TemplateError(
            f"model.chat_template: {name} needs {', '.join(missing)}, which the tokenizer of the language model "
            "lacks; choose the template that the language model was trained with"
        )
    text = resources.files("llava_train.data").joinpath(f"templates/{name}.jinja").read_text(encoding="utf-8")
    has_bos = tokenizer.bos_token_id is not None
    adds_bos = has_bos and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    starts_with_image = name == "plain"
    return ("{{- bos_token -}}" if adds_bos or (has_bos and starts_with_image) else "") + text.rstrip("\n")


class ChatEncoder:
    """Encodes samples with one tokenizer and chat template.

    Args:
        tokenizer: a fast tokenizer that has `<image>` as one token.
        template: jinja text with generation marks, from `load_template`.
        n_image_tokens: tokens an image takes in the language model.
        max_tokens: most tokens of a sample.
        over_long: what to do with a longer one; `error` and `drop` raise SampleError.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        n_image_tokens: int,
        max_tokens: int,
        over_long: Literal["error", "drop", "truncate"] = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.n_image_tokens = n_image_tokens
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        self.max_tokens = max_tokens
        self.over_long = over_long
        control = set(tokenizer.all_special_tokens)
        control |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        control |= {token for tokens in _CONTROL_TOKENS.values() for token in tokens if token in template}
        self._control_tokens = re.compile("|".join(map(re.escape, sorted(control - {IMAGE_PLACEHOLDER}))) or "(?!)")

    def encode(self, sample: Sample) -> EncodedSample:
        """Token ids and labels of a sample.

        Raises:
            OverLong: more than `max_tokens` tokens, under `error` and `drop`, or when nothing supervised is left.
            SampleError: a control token in a text, or nothing to supervise.
        """
        self._refuse_control_tokens(sample)
        text, spans = self.render(sample.turns)
        input_ids, labels = self._tokenize(text, spans)
        is_image = input_ids == self.image_token_id
        assert is_image.sum() == len(sample.images), "the template lost or made an image placeholder"
        repeats = np.where(is_image, self.n_image_tokens, 1)
        input_ids, labels = np.repeat(input_ids, repeats), np.repeat(labels, repeats)
        labels[0] = IGNORED
        encoded = EncodedSample(input_ids, labels, len(sample.images))
        if encoded.n_tokens > self.max_tokens:
            encoded = self._shorten(encoded)
        if not (encoded.labels != IGNORED).any():
            raise SampleError("no supervised token: every answer is empty or cut off")
        return encoded

    def render(self, turns: tuple[Turn, ...], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans `[start, end)` of what the assistant says.

        With `prompt`, the text ends where an answer would begin.
        """
        rendered, spans = render_jinja_template(
            conversations=[[{"role": turn.role, "content": turn.text} for turn in turns]],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **self.tokenizer.special_tokens_map,
        )
        return rendered[0], spans[0]

    def end_of_turn_id(self) -> int:
        """The token that ends an answer: generation must stop at it."""
        text, spans = self.render((Turn("user", "a"), Turn("assistant", "a")))
        _, labels = self._tokenize(text, spans)
        return int(labels[labels != IGNORED][-1])

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] and labels [T] of a text, `<image>` being one token."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64)
        supervised = np.zeros(len(input_ids), dtype=bool)
        for start, end in spans:
            supervised |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return input_ids, np.where(supervised, input_ids, IGNORED)

    def _refuse_control_tokens(self, sample: Sample) -> None:
        for number, turn in enumerate(sample.turns, start=1):
            if found := self._control_tokens.search(turn.text):
                raise SampleError(f"turn {number}: the text holds the control token {found.group()!r}")

    def _shorten(self, encoded: EncodedSample) -> EncodedSample:
        """Cuts a sample to `max_tokens`, before an image that would be cut in two."""
        if self.over_long != "truncate":
            raise OverLong(encoded.n_tokens, self.max_tokens)
        image_positions = np.flatnonzero(encoded.input_ids == self.image_token_id)
        starts = image_positions[:: self.n_image_tokens]
        cut = self.max_tokens
        n_whole = int(np.sum(starts + self.n_image_tokens <= cut))
        if n_whole < len(starts):
            cut = min(cut, int(starts[n_whole]))
        labels = encoded.labels[:cut]
        if not (labels != IGNORED).any():
            raise OverLong(encoded.n_tokens, self.max_tokens, "and cutting it leaves nothing to supervise")
        return EncodedSample(encoded.input_ids[:cut], labels, n_whole, truncated=True)


class OverLong(SampleError):
    """A sample has too many tokens."""

    def __init__(self, n_tokens: int, max_tokens: int, detail: str = "") -> None:
        super().__init__(f"{n_tokens} tokens, more than batch.max_sample_tokens ({max_tokens}) {detail}".rstrip())
