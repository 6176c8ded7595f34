"""`Sample`: a validated conversation and its pictures, whatever the format of its record was (`data.formats`)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llava_train.data.pictures import Picture
from llava_train.data.problems import SampleError

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cn", "Zs", "Zl", "Zp")
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Characters of other categories that show nothing: fillers, joiners, variation selectors, the empty Braille cell."""


@dataclass(frozen=True)
class Turn:
    """One message. `text` holds `<image>` where an image goes.

    `supervised` is False for an assistant turn that stays in the conversation but is not trained on.
    """

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Sample:
    """A validated conversation: user and assistant take turns, the assistant has the last word.

    `images[i]` is the picture of the i-th `<image>` in the turns.
    """

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]


def has_visible_text(text: str) -> bool:
    """True if a text has a character that can be seen; white space and zero-width characters cannot."""
    return any(
        unicodedata.category(character) not in _INVISIBLE_CATEGORIES and not _INVISIBLE.match(character)
        for character in text
    )


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuses a conversation out of order, or with a supervised answer that shows nothing. Raises SampleError."""
    spoken = [turn.role for turn in turns]
    if spoken[:1] == ["system"]:
        spoken = spoken[1:]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SampleError(
            "roles_out_of_order",
            f"roles out of order: {', '.join(spoken)}; wanted user, assistant, user, assistant, ...",
        )
    for number, turn in enumerate(turns, start=1):
        if turn.role == "assistant" and turn.supervised and not has_visible_text(turn.text):
            raise SampleError(
                "empty_answer",
                f"turn {number}: the answer is empty: {turn.text!r:.40} has no visible character; write an answer, "
                'remove the turn, or mark it "loss": false',
            )


def check_unicode(text: str, what: str) -> None:
    """Refuses a text that no tokenizer takes and no file can hold. Raises SampleError, which names it `what`."""
    if _SURROGATE.search(text):
        raise SampleError("not_utf8", f"{what} holds half of a character (a lone UTF-16 surrogate)")


def check_placeholders(turns: Sequence[Turn], n_images: int) -> None:
    """Refuses turns whose `<image>` do not stand for `n_images` images, one each. Raises SampleError."""
    for number, turn in enumerate(turns, start=1):
        if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
            raise SampleError("placeholders", f"turn {number}: {IMAGE_PLACEHOLDER} outside a user turn")
    n_asked = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if n_asked != n_images:
        hint = f"; write {IMAGE_PLACEHOLDER} in the user's text where the image goes" if not n_asked else ""
        raise SampleError("placeholders", f"{n_asked} {IMAGE_PLACEHOLDER} placeholders, but {n_images} images{hint}")
