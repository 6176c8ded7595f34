"""`Sample`, and how the records of data sets become samples.

The shape of a record is told by its keys:

    conversations  LLaVA: `{"id", "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human" | "gpt" |
                   "system", "value": text}, ...]}`; `<image>` in a human text says where an image goes
    messages       chats: `{"images": [...], "messages": [{"role", "content"}, ...]}`; the content is a text as above
                   (without any `<image>` the images come first) or a list of parts, `{"type": "text", "text"}` and
                   `{"type": "image"}`, the image in the part, the one of its `index`, or the next of `images`
    texts          the_cauldron and FineVision: `{"images": [...], "texts": [{"user", "assistant"}, ...]}`; the
                   images come first

Other keys are ignored. An `<image>` where it cannot stand for an image is refused, never shown to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llava_train.data.pictures import Picture, Pictures
from llava_train.data.problems import SampleError

IMAGE_PLACEHOLDER = "<image>"

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message. `text` holds `<image>` where an image goes."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """A validated conversation: user and assistant take turns, the assistant has the last word.

    `images[i]` is the picture of the i-th `<image>` in the turns.
    """

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]


def parse_record(record: Any, pictures: Pictures, default_id: str) -> Sample:
    """A record of any known shape as a Sample. Texts lose surrounding white space. Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError("not_an_object", f"a record is a JSON object, not {type(record).__name__}")
    listed = _listed_images(record)
    if record.get("texts") is not None and record.get("conversations") is record.get("messages") is None:
        turns, images = _parse_pairs(record["texts"]), listed
        _refuse_placeholders(turns)
        turns = _images_first(turns, len(images))
    else:
        is_chat = record.get("conversations") is None and record.get("messages") is not None
        name = "messages" if is_chat else "conversations"
        turns, images = _parse_messages(record.get(name), name, listed)
        if is_chat and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
            turns = _images_first(turns, len(images))
    turns = [Turn(turn.role, turn.text.strip()) for turn in turns]
    _check_order(turns)
    check_placeholders(turns, len(images))
    return Sample(record_id(record, default_id), tuple(map(pictures.picture, images)), tuple(turns))


def record_id(record: Any, default_id: str) -> str:
    """The id that a record states, valid or not; halves of characters, which no file takes, are escaped."""
    stated = record.get("id") if isinstance(record, dict) else None
    return default_id if stated is None else str(stated).encode("utf-8", "backslashreplace").decode("utf-8")


def _listed_images(record: dict[str, Any]) -> list[Any]:
    listed: Any = next((record[key] for key in ("image", "images") if record.get(key) not in (None, "", [])), [])
    return listed if isinstance(listed, list) else [listed]


def _parse_pairs(texts: Any) -> list[Turn]:
    """Turns of `[{"user": text, "assistant": text}, ...]`."""
    if not isinstance(texts, list) or not texts:
        raise SampleError("no_conversation", '"texts" is empty or not a list')
    turns = []
    for number, pair in enumerate(texts, start=1):
        if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
            raise SampleError("malformed_turn", f'turn {number}: a turn is {{"user": text, "assistant": text}}')
        turns.append(Turn("user", _checked_text(pair["user"], number)))
        turns.append(Turn("assistant", _checked_text(pair["assistant"], number)))
    return turns


def _parse_messages(messages: Any, name: str, listed: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns of `[{"from" | "role", "value" | "content"}, ...]`, and their images in order."""
    if isinstance(messages, dict) and all(isinstance(values, list) for values in messages.values()):
        messages = [dict(zip(messages, values, strict=False)) for values in zip(*messages.values(), strict=False)]
    if not isinstance(messages, list) or not messages:
        raise SampleError("no_conversation", f'"{name}" is missing, empty or not a list')
    parsed = [_parse_message(message, number) for number, message in enumerate(messages, start=1)]
    if all(own is None for _, own in parsed):
        return [turn for turn, _ in parsed], listed
    return [turn for turn, _ in parsed], _images_of_parts([image for _, own in parsed for image in own or []], listed)


def _images_of_parts(parts: list[Any], listed: list[Any]) -> list[Any]:
    """The image of each part: its own, the one of its index in `listed`, or the next of `listed`. All must be used."""
    by_index = [part for part in parts if isinstance(part, int)]
    if by_index:
        used = set(by_index)
        images = [listed[part] if part in range(len(listed)) else part for part in parts if isinstance(part, int)]
        fits = len(by_index) == len(parts) and used == set(range(len(listed)))
    else:
        rest = iter(listed)
        images = [next(rest, None) if part is None else part for part in parts]
        fits = None not in images and not list(rest)
    if not fits:
        raise SampleError("placeholders", f"{len(parts)} image parts do not fit the {len(listed)} images of the record")
    return images


def _parse_message(message: Any, number: int) -> tuple[Turn, list[Any] | None]:
    """A turn, and the images of its parts as `_image_of_part` gives them; None where the content is a text."""
    if not isinstance(message, dict) or not message.keys() & {"value", "content"}:
        raise SampleError("malformed_turn", f'turn {number}: a turn is {{"from": ..., "value": text}}')
    stated = _first_stated(message, "from", "role")
    role = _ROLES.get(str(stated))
    if role is None:
        raise SampleError("unknown_role", f"turn {number}: unknown role {stated!r}; known: {', '.join(_ROLES)}")
    content = _first_stated(message, "value", "content")
    if not isinstance(content, list):
        return Turn(role, _checked_text(content, number)), None
    pieces, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text":
            text = _checked_text(part.get("text"), number)
            _refuse_placeholders([Turn(role, text)])
            pieces.append(text)
        elif kind in ("image", "image_url"):
            images.append(_image_of_part(part))
            pieces.append(IMAGE_PLACEHOLDER)
        else:
            raise SampleError("malformed_turn", f"turn {number}: a part is of type text or image, not {kind}")
    return Turn(role, "".join(_beside_images(pieces))), images


def _beside_images(pieces: list[str]) -> Iterator[str]:
    """Puts a new line between an image and what stands beside it, as the chat templates do."""
    for number, piece in enumerate(pieces):
        if number and IMAGE_PLACEHOLDER in (piece, pieces[number - 1]):
            yield "\n"
        yield piece


def _first_stated(holder: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that has one: Arrow gives each row the keys of all."""
    return next((holder[key] for key in keys if holder.get(key) is not None), None)


def _image_of_part(part: dict[str, Any]) -> Any:
    """The part's own image, its index in the record's images, or None."""
    found = _first_stated(part, "image", "path", "url", "image_url", "index")
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def _checked_text(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise SampleError("not_text", f"turn {number}: the text is {text!r:.60}, not a string")
    check_unicode(text, f"turn {number}: the text")
    return text


def _refuse_placeholders(turns: list[Turn]) -> None:
    """Where images have a place of their own, `<image>` in a text stands for none."""
    if any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        raise SampleError("placeholders", f"a text holds {IMAGE_PLACEHOLDER}, which stands for no image here")


def _images_first(turns: list[Turn], n_images: int) -> list[Turn]:
    """Puts placeholders before the text of the first user turn."""
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"{IMAGE_PLACEHOLDER}\n" * n_images + turn.text
            return [*turns[:i], Turn("user", text), *turns[i + 1 :]]
    return turns


def _check_order(turns: list[Turn]) -> None:
    spoken = [turn.role for turn in turns]
    if spoken[0] == "system":
        spoken = spoken[1:]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SampleError(
            "roles_out_of_order",
            f"roles out of order: {', '.join(spoken)}; wanted user, assistant, user, assistant, ...",
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
        raise SampleError("placeholders", f"{n_asked} {IMAGE_PLACEHOLDER} placeholders, but {n_images} images")
