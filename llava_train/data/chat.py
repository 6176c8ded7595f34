"""Sample -> token ids and labels.

A sample is rendered once by the chat template and tokenized once. The template marks what the assistant says
with `{% generation %}`; the marks give character spans, the tokenizer gives each token's characters, and a
token is supervised exactly when it holds a character of a span. Then each `<image>` is widened to the number
of image tokens by repeating its id. For `chatml` and an image of 3 tokens:

    text    <|im_start|>user\\n<image>\\nWhat?<|im_end|>\\n<|im_start|>assistant\\nA cat<|im_end|>\\n
    ids     ... <image> <image> <image> ...                              A   cat   <|im_end|>   \\n
    labels  ... -100    -100    -100    ...                              A   cat   <|im_end|>  -100

The exported processor carries the same template, so that training and use cannot differ.

What a text may hold: the placeholder `<image>` in a user's turn, once for each picture, and nothing else that the
tokenizer would take for a control token. Those are its special tokens and every added token that the template writes
(`<|im_end|>` with `chatml`, whatever the tokenizer says of it); a sample with one is refused. Markers that are no
tokens (`ASSISTANT:`, `[INST]`, `###`; `</s>` for a tokenizer without it) are text like any other and trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_train.data.chat_templates import render
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER, Sample, Turn, check_placeholders

IGNORED = -100
"""Label of a token that is not supervised."""

_ANSWER = "answer"
_TRIAL = (Turn("system", "."), Turn("user", "."), Turn("assistant", _ANSWER))


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


class ChatEncoder:
    """Encodes samples with one tokenizer and chat template.

    Args:
        tokenizer: a fast tokenizer that has `<image>` as one token.
        template: jinja text with generation marks, from `chat_templates.load_template`.
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
        control_tokens = self._control_tokens()
        unknown = tokenizer.unk_token_id
        self._control_ids = {tokenizer.convert_tokens_to_ids(token): token for token in control_tokens}
        self._control_ids.pop(unknown, None)  # stands for every character that the tokenizer does not know
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, sample: Sample) -> EncodedSample:
        """Token ids and labels of a sample.

        Raises:
            OverLong: more than `max_tokens` tokens, under `error` and `drop`, or when nothing supervised is left.
            SampleError: a control token or a wrong `<image>` in a text, or nothing to supervise.
        """
        self.check_texts(sample.turns, len(sample.images))
        text, spans = self._rendered(sample)
        input_ids, labels = self.tokenize(text, spans, len(sample.images))
        encoded = EncodedSample(input_ids, labels, len(sample.images))
        if encoded.n_tokens > self.max_tokens:
            encoded = self._shorten(encoded)
        if not (encoded.labels != IGNORED).any():
            raise SampleError(
                "nothing_supervised", "no supervised token: every answer is cut off, or marked as not trained on"
            )
        return encoded

    def _rendered(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Text of a sample, and the span of each answer that is trained on. Raises SampleError."""
        try:
            text, spans = self.render(sample.turns)
        except Exception as error:  # jinja passes on whatever the expressions of a template raise
            raise SampleError(
                "template_refuses", f"the chat template fails: {type(error).__name__}: {error}"
            ) from error
        n_answers = sum(turn.role == "assistant" for turn in sample.turns)
        if len(spans) != n_answers:
            raise SampleError("template_refuses", f"the chat template marks {len(spans)} of {n_answers} answers")
        answers = [turn for turn in sample.turns if turn.role == "assistant"]
        return text, [span for span, turn in zip(spans, answers, strict=True) if turn.supervised]

    def render(self, turns: tuple[Turn, ...], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans `[start, end)` of what the assistant says.

        With `prompt`, the text ends where an answer would begin.
        """
        return render(self.template, self.tokenizer, turns, prompt)

    def end_of_turn_id(self) -> int:
        """The token at which generation must stop: the control token, or the only token, that ends an answer.

        An answer that ends with a text of several tokens (`###` of `llava_v0`) may hold each of them elsewhere: then it
        is the tokenizer's end-of-sequence token, and `stop_string` says where an answer ends.
        """
        text, start, end = self._end_of_turn()
        if found := self._control_pattern.search(text, start, end):
            return int(self.tokenizer.convert_tokens_to_ids(found.group()))
        _, labels = self._tokenize(text, [(start, end)])
        ids = labels[labels != IGNORED]
        if len(ids) == 1 or self.tokenizer.eos_token_id is None:
            return int(ids[-1])
        return int(self.tokenizer.eos_token_id)

    def stop_string(self) -> str | None:
        """The text that ends an answer, where no control token does; None where `end_of_turn_id` is enough."""
        text, start, end = self._end_of_turn()
        return None if self._control_pattern.search(text, start, end) else text[start:end]

    def _end_of_turn(self) -> tuple[str, int, int]:
        """A text, and where in it the end of an answer stands."""
        text, [(start, end)] = self.render(_TRIAL)
        return text, text.index(_ANSWER, start) + len(_ANSWER), end

    def tokenize(self, text: str, spans: list[tuple[int, int]], n_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] and labels [T] of a rendered text, its images widened. Raises SampleError."""
        input_ids, labels = self._tokenize(text, spans)
        is_image = input_ids == self.image_token_id
        if is_image.sum() != n_images:
            raise SampleError("template_refuses", f"the chat template writes {is_image.sum()} {IMAGE_PLACEHOLDER}")
        repeats = np.where(is_image, self.n_image_tokens, 1)
        input_ids, labels = np.repeat(input_ids, repeats), np.repeat(labels, repeats)
        labels[0] = IGNORED
        return input_ids, labels

    def _tokenize(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [T] and labels [T] of a text, `<image>` being one token."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64)
        self._refuse_disguised(text, input_ids, offsets)
        supervised = np.zeros(len(input_ids), dtype=bool)
        for start, end in spans:
            supervised |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return input_ids, np.where(supervised, input_ids, IGNORED)

    def _refuse_disguised(self, text: str, input_ids: np.ndarray, offsets: np.ndarray) -> None:
        """Refuses a control token that the tokenizer's normalizer made of other characters, such as wide ones."""
        for position in np.flatnonzero(np.isin(input_ids, list(self._control_ids))).tolist():
            start, end = offsets[position]
            if self._control_ids[int(input_ids[position])] not in text[start:end]:
                raise SampleError("control_token", f"the tokenizer takes {text[start:end]!r} for a control token")

    def _control_tokens(self) -> set[str]:
        """Contents of the tokens that no text may hold."""
        markup, _ = self.render(_TRIAL)
        added = self.tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special or token.content in markup}
        control |= set(self.tokenizer.all_special_tokens)
        # Runs of white space are added tokens of Phi and Gemma.
        return {token for token in control if token.strip() and token != IMAGE_PLACEHOLDER}

    def check_texts(self, turns: Sequence[Turn], n_images: int) -> None:
        """Refuses control tokens and `<image>` that stand for no image. Raises SampleError."""
        for number, turn in enumerate(turns, start=1):
            if found := self._control_pattern.search(turn.text):
                raise SampleError("control_token", f"turn {number}: the text holds the control token {found.group()!r}")
        check_placeholders(turns, n_images)

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
        super().__init__(
            "over_long", f"{n_tokens} tokens, more than batch.max_sample_tokens ({max_tokens}) {detail}".rstrip()
        )
