"""Pieces that several formats share: texts, loss flags, pairs of question and answer, the place of images."""

from __future__ import annotations

from typing import Any

from llava_train.data.formats.keys import LOSS_KEYS
from llava_train.data.formats.values import is_missing
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER, Role, Turn, check_unicode


def checked_text(text: Any, number: int) -> str:
    """A turn's text. Raises SampleError where it is not a valid string."""
    if not isinstance(text, str):
        raise SampleError("not_text", f"turn {number}: the text is {text!r:.60}, not a string")
    check_unicode(text, f"turn {number}: the text")
    return text


def is_supervised(turn: dict[str, Any], role: Role, number: int) -> bool:
    """False where a flag of an assistant turn, such as `"loss": false` or `"weight": 0`, leaves it out of training.

    Raises:
        SampleError: a flag that is neither on nor off, flags that disagree, or a flag that is on for another role.
    """
    flags = {key: turn[key] for key in turn.keys() & LOSS_KEYS if not is_missing(turn[key])}
    for key, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise SampleError(
                "unsupported_key",
                f'turn {number}: "{key}": {value!r:.60} is neither on nor off; write true or 1 to train on the turn, '
                "false or 0 to leave it out",
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise SampleError("unsupported_key", f"turn {number}: {' and '.join(sorted(flags))} disagree; keep one of them")
    if role != "assistant" and any(flags.values()):
        raise SampleError(
            "unsupported_key",
            f'turn {number}: "{next(iter(flags))}" asks to train on a {role} turn; only assistant turns are trained on',
        )
    return role != "assistant" or all(flags.values())


def first_stated(holder: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: Arrow gives each row the keys of all. Without any, an empty text."""
    values = [holder[key] for key in keys if holder.get(key) is not None]
    return next((value for value in values if not is_missing(value)), values[0] if values else None)


def question_and_answer(question: Any, answer: Any, number: int, supervised: bool = True) -> list[Turn]:
    """A user's and an assistant's turn; `number` is that of the first. Raises SampleError."""
    asked = Turn("user", checked_text(question, number))
    return [asked, Turn("assistant", checked_text(answer, number + 1), supervised)]


def refuse_placeholders(turns: list[Turn]) -> None:
    """Refuses `<image>` in a text where images have a place of their own. Raises SampleError."""
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        raise SampleError("placeholders", f"a text holds {IMAGE_PLACEHOLDER}, which stands for no image here")


def images_first(turns: list[Turn], n_images: int) -> list[Turn]:
    """The turns with placeholders before the text of the first user turn."""
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"{IMAGE_PLACEHOLDER}\n" * n_images + turn.text
            return [*turns[:i], Turn("user", text), *turns[i + 1 :]]
    return turns


def images_first_unless_placed(turns: list[Turn], n_images: int) -> list[Turn]:
    """The turns with placeholders in front, where no turn has any `<image>`."""
    placed = any(IMAGE_PLACEHOLDER in turn.text for turn in turns)
    return turns if placed else images_first(turns, n_images)
