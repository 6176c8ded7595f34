"""Records that are a list of messages: LLaVA's `conversations`, and chats, `messages`.

conversations  `{"id", "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human" | "gpt" | "system",
               "value": text}, ...]}`; `<image>` in a human text says where an image goes
messages       `{"images": [...], "messages": [{"role", "content"}, ...]}`; the content is a text as above (without any
               `<image>` the images come first) or a list of parts, `{"type": "text", "text" | "value"}` and
               `{"type": "image"}`: the image in the part, the one of its `index`, or the next of `images`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_train.data.formats.keys import same_value
from llava_train.data.formats.turns import (
    checked_text,
    first_stated,
    images_first_unless_placed,
    is_supervised,
    refuse_placeholders,
)
from llava_train.data.formats.values import as_rows, is_missing
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER, Role, Turn

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def parse_conversations(record: dict[str, Any], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns and images of `{"conversations": [...]}`. Raises SampleError."""
    return _parse_messages(record["conversations"], "conversations", images)


def parse_messages(record: dict[str, Any], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns and images of `{"messages": [...]}`. Raises SampleError."""
    turns, images = _parse_messages(record["messages"], "messages", images)
    return images_first_unless_placed(turns, sum(not is_missing(image) for image in images)), images


def _parse_messages(messages: Any, name: str, listed: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns of `[{"from" | "role", "value" | "content"}, ...]`, and their images in order."""
    messages = _rows(messages, name)
    parsed = [_parse_message(message, number) for number, message in enumerate(messages, start=1)]
    turns = [turn for turn, _ in parsed]
    if all(own is None for _, own in parsed):
        return turns, listed
    return turns, _images_of_parts([image for _, own in parsed for image in own or []], listed)


def _rows(messages: Any, name: str) -> list[Any]:
    """The messages as a list; `datasets` may keep a list of objects as columns. Raises SampleError."""
    if isinstance(messages, str):
        raise SampleError("no_conversation", f'"{name}" is a text, not a list; if it holds JSON, write the parsed list')
    if isinstance(messages, dict) and all(isinstance(values, list) for values in messages.values()):
        if not messages.keys() & {"from", "role", "value", "content"}:
            raise SampleError(
                "no_conversation",
                f'"{name}" is a column of a table; write one record a row (pandas: to_json(orient="records"))',
            )
        messages = as_rows(messages)
        if isinstance(messages, dict):
            raise SampleError("malformed_turn", f'"{name}" has columns of different lengths')
    if not isinstance(messages, list) or not messages:
        raise SampleError("no_conversation", f'"{name}" is missing, empty or not a list')
    return messages


def _parse_message(message: Any, number: int) -> tuple[Turn, list[Any] | None]:
    """A turn, and the images of its parts as `_image_of_part` gives them; None where the content is a text."""
    if not isinstance(message, dict) or not message.keys() & {"value", "content"}:
        found = f", not one with the keys {', '.join(map(str, message))}" if isinstance(message, dict) else ""
        raise SampleError("malformed_turn", f'turn {number}: a turn is {{"from": ..., "value": text}}{found}')
    stated = first_stated(message, "from", "role")
    role = _ROLES.get(str(stated))
    if role is None:
        raise SampleError("unknown_role", f"turn {number}: unknown role {stated!r:.60}; known: {', '.join(_ROLES)}")
    for keys in (("from", "role"), ("value", "content")):
        if keys[0] not in message or keys[1] not in message:
            continue
        values = [message[key] for key in keys if not is_missing(message.get(key))]
        if len(values) == 2 and values[0] != values[1]:
            raise SampleError("malformed_turn", f'turn {number}: "{keys[0]}" and "{keys[1]}" differ; keep one of them')
    supervised = is_supervised(message, role, number)
    content = as_rows(first_stated(message, "value", "content"))
    if not isinstance(content, list):
        return Turn(role, checked_text(content, number), supervised), None
    text, images = _joined_parts(content, number, role)
    return Turn(role, text, supervised), images


def _joined_parts(content: list[Any], number: int, role: Role) -> tuple[str, list[Any]]:
    """The text of a list of parts, and the image of each of its placeholders as `_image_of_part` gives it."""
    pieces, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text":
            text = checked_text(first_stated(part, "text", "value"), number)
            refuse_placeholders([Turn(role, text)])
            pieces.append(text)
        elif kind in ("image", "image_url"):
            if not is_missing(part.get("text")):
                raise SampleError(
                    "malformed_turn", f'turn {number}: an image part has a "text"; write it as a part of its own'
                )
            images.append(_image_of_part(part, number))
            pieces.append(IMAGE_PLACEHOLDER)
        elif str(kind).startswith(("video", "audio", "input_audio")):
            raise SampleError(
                "video_or_sound",
                f"turn {number}: a part is of type {kind}; llava_train trains on pictures and text only",
            )
        else:
            raise SampleError("malformed_turn", f"turn {number}: a part is of type text or image, not {kind!r:.60}")
    return "".join(_beside_images(pieces)), images


def _beside_images(pieces: list[str]) -> Iterator[str]:
    """Puts a new line between an image and what stands beside it, as the chat templates do."""
    for number, piece in enumerate(pieces):
        if number and IMAGE_PLACEHOLDER in (piece, pieces[number - 1]):
            yield "\n"
        yield piece


def _image_of_part(part: dict[str, Any], number: int) -> Any:
    """The part's own image, its index in the record's images, or None. Raises SampleError where it has several."""
    keys = [key for key in ("image", "path", "url", "image_url", "value") if not is_missing(part.get(key))]
    others = [part[key] for key in keys[1:] if not (isinstance(part[key], str) and "://" in part[key])]
    if any(not same_value(part[keys[0]], other) for other in others):
        raise SampleError("malformed_turn", f"turn {number}: {' and '.join(keys)} of an image part differ; keep one")
    found = part[keys[0]] if keys else first_stated(part, "index")
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def _images_of_parts(parts: list[Any], listed: list[Any]) -> list[Any]:
    """The image of each part: its own, the one of its index in `listed`, or the next of `listed`. All must be used."""
    by_index = [part for part in parts if isinstance(part, int)]
    if by_index:
        images = [listed[part] if part in range(len(listed)) else None for part in by_index]
        unused = {number for number, image in enumerate(listed) if not is_missing(image)} - set(by_index)
        fits = len(by_index) == len(parts) and not unused
    else:
        rest = iter([image for image in listed if not is_missing(image)])
        images = [next(rest, None) if part is None else part for part in parts]
        fits = not list(rest)
    if not fits or any(map(is_missing, images)):
        n_listed = sum(not is_missing(image) for image in listed)
        raise SampleError(
            "placeholders",
            f"{len(parts)} image parts do not fit the {n_listed} images of the record; a part may hold its own image, "
            'as "image", "path", "url" or "image_url"',
        )
    return images
