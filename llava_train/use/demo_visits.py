"""What the demo page does when something happens on it.

A conversation lives in the visitor's session on the server; what the browser shows of it is never read back. Another
picture begins another conversation, for of one picture is what LLaVA models are mostly trained on. Stopping and leaving
close the generator of an answer, which ends its computation.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from llava_train.data.images import decoded, open_image
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.errors import UserError
from llava_train.use.demo_intake import uploaded_file
from llava_train.use.examples import Example
from llava_train.use.generation import Sampling
from llava_train.use.llava import LLaVA, Question

_PREVIEW_SIDE = 1024
"""Pixels of the longer side of what the page shows of a picture."""

THUMBNAIL_SIDE = 160
"""Pixels of a side of an example's thumbnail, which is square."""

_NO_PICTURE = "<em>(no picture: the model saw only your question)</em><br>"
"""HTML before each answer of a conversation without a picture; answers themselves are escaped."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Limits:
    """What may be uploaded."""

    upload_mb: float = 10
    megapixels: float = 25


@dataclass(frozen=True)
class Conversation:
    """What a visitor has said and heard, about a picture or none."""

    picture: Path | Image.Image | None = None
    turns: tuple[Turn, ...] = ()

    def asking(self, text: str) -> Question:
        """The conversation with another question at its end."""
        first, *rest = (*self.turns, Turn("user", text))
        if self.picture is None:
            return Question((first, *rest))
        return Question((Turn("user", f"{IMAGE_PLACEHOLDER}\n{first.text}"), *rest), (self.picture,))

    def answered(self, text: str, answer: str) -> Conversation:
        return replace(self, turns=(*self.turns, Turn("user", text), Turn("assistant", answer)))

    def messages(self, asked: str | None = None) -> Messages:
        """As gradio shows them, which takes text for HTML; `asked` waits for its answer."""
        turns = self.turns if asked is None else (*self.turns, Turn("user", asked))
        return [{"role": turn.role, "content": self._shown(turn)} for turn in turns]

    def _shown(self, turn: Turn) -> str:
        text = html.escape(turn.text, quote=False)
        return _NO_PICTURE + text if turn.role == "assistant" and self.picture is None else text


def preview(picture: Path | Image.Image, limits: Limits) -> Image.Image:
    """A picture as the model sees it, shrunk for the page. Raises UserError."""
    if isinstance(picture, Path):
        file = EmbeddedPicture(picture.read_bytes(), picture.name)  # to be called by its name, not by where it lies
        with open_image(file) as image:
            n_megapixels = image.width * image.height / 1e6
            if n_megapixels > limits.megapixels:
                raise UserError(f"{file}: {n_megapixels:.0f} megapixels; up to {limits.megapixels:g} are taken")
            picture = decoded(image, file)
    shown = picture.copy()
    shown.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    return shown


def thumbnail(picture: Image.Image) -> Image.Image:
    """Return the middle of an example's picture as a square, so that a panorama is more than a line."""
    return ImageOps.fit(picture, (THUMBNAIL_SIDE, THUMBNAIL_SIDE))


@dataclass
class Visit:
    """What the server keeps of a visitor. Whatever begins another conversation replaces this one."""

    conversation: Conversation = Conversation()


@dataclass(frozen=True)
class Answers:
    """What the page does when something happens on it."""

    llava: LLaVA
    examples: Sequence[Example]
    limits: Limits
    uploads: Path
    """The folder of all uploads."""

    def upload(self, file: Any, visit: Visit) -> tuple[Any, Any]:
        """Another picture, and so another conversation. A wrong file changes nothing."""
        try:
            path = uploaded_file(file, self.uploads, self.limits.upload_mb)
            shown = preview(path, self.limits)
        except (UserError, OSError) as error:
            _say(error)
            now = visit.conversation.picture
            return None if now is None else preview(now, self.limits), gr.skip()
        visit.conversation = Conversation(path)
        return shown, []

    def empty(self, file: Any, visit: Visit) -> Any:
        """The box was emptied, by the visitor, or by the browser when a file was too large for it."""
        if file is None and visit.conversation.picture:
            visit.conversation = Conversation()
            return []
        return gr.skip()

    def clear(self, visit: Visit) -> Messages:
        visit.conversation = Conversation(visit.conversation.picture)
        return []

    def try_example(self, number: Any, visit: Visit) -> tuple[Image.Image, Messages, str]:
        if not isinstance(number, int) or not 0 <= number < len(self.examples):
            raise gr.Error("there is no such example", print_exception=False)
        example = self.examples[number]
        visit.conversation = Conversation(example.picture)
        return example.picture, [], example.question

    def ask(
        self, text: str | None, visit: Visit, temperature: float, max_new_tokens: int
    ) -> Iterator[tuple[Messages, Any]]:
        """The conversation, grown by each piece of the answer. An answer that is stopped stays as far as it came."""
        text, before = _sendable(text or "").strip(), visit.conversation
        if not text:
            yield before.messages(), gr.skip()  # yielding nothing would empty the page
            return
        try:
            sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
            if IMAGE_PLACEHOLDER in text:
                raise UserError(f"leave {IMAGE_PLACEHOLDER} out of the question: the picture stands before it")
            yield before.messages(text), ""
            heard, now = "", before
            for piece in self.llava.stream(before.asking(text), sampling=sampling):
                if visit.conversation is not now:  # another one has begun, faster than this one was ended
                    break
                heard += piece
                now = visit.conversation = before.answered(text, heard)
                yield now.messages(), gr.skip()
        except (UserError, OSError) as error:
            _say(error)
            yield before.messages(), text


def _sendable(text: str) -> str:
    """A text without lone surrogates, which JSON can bring in and nothing can send back."""
    return text.encode(errors="replace").decode()


def _say(error: Exception) -> None:
    gr.Warning(html.escape(str(error), quote=False))
