"""The formats of records, and how a record of any of them becomes a `Sample`.

The format is detected from the keys of a record: see `conversations` and `pairs`. All formats have `id`, `image` or
`images`, and `system`, the text of a system turn. A turn may have a flag, `"loss": false` or `"weight": 0`, which
leaves it out of training. A key that is not read is harmless or refused: see `keys`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llava_train.data.formats import keys
from llava_train.data.formats.conversations import parse_conversations, parse_messages
from llava_train.data.formats.pairs import parse_instruction, parse_query, parse_texts
from llava_train.data.formats.values import is_missing, names_media
from llava_train.data.pictures import Pictures, content_and_name
from llava_train.data.problems import SampleError, shortened
from llava_train.data.samples import Sample, Turn, check_placeholders, check_turns, check_unicode

_MARKUP = re.compile(
    r"!\[[^\]\n]*\]\([^)\n]+\)|<img\b[^>\n]*>|\[(IMG|image)\]|<(images?|img)([ _-]?\d+)?>|"
    r"<\|image(_\d+|_pad|_start)?\|>|<(ImageHere|IMG_CONTEXT|image_soft_token|start_of_image|im_patch|picture)>|data:image/\w+;base64,",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        name: the key that shows it.
        keys: keys of a record that only this format reads.
        parse: (record, values of its images) -> turns, and the value of the image of each `<image>` in them.
        turns_key: where the turns are, if they are objects.
        turn_keys: keys of a turn that are read.
    """

    name: str
    keys: frozenset[str]
    parse: Callable[[dict[str, Any], list[Any]], tuple[list[Turn], list[Any]]]
    turns_key: str | None = None
    turn_keys: frozenset[str] = frozenset()


_PAIR_KEYS = frozenset({"user", "assistant", *keys.LOSS_KEYS})
_CONVERSATIONS = Format(
    "conversations", frozenset({"conversations"}), parse_conversations, "conversations", keys.TURN_KEYS
)
_MESSAGES = Format("messages", frozenset({"messages"}), parse_messages, "messages", keys.TURN_KEYS)
_TEXTS = Format("texts", frozenset({"texts"}), parse_texts, "texts", _PAIR_KEYS)
_INSTRUCTION = Format("instruction", frozenset({"instruction", "input", "output", "history"}), parse_instruction)
_QUERY = Format("query", frozenset({"query", "response", "history"}), parse_query)

_KNOWN = '"conversations", "messages", "texts", "instruction" with "output", or "query" with "response"'
_QUESTION_KEYS = ("question", "prompt", "instruction", "input", "user", "human", "problem")
_ANSWER_KEYS = ("answer", "answers", "completion", "output", "response", "assistant", "caption", "text", "solution")


def parse_record(record: Any, pictures: Pictures, default_id: str) -> Sample:
    """The Sample of a record of any known format. Texts lose surrounding white space. Raises SampleError."""
    if not isinstance(record, dict):
        raise SampleError("not_an_object", f"a record is a JSON object, not {type(record).__name__}")
    shape = format_of(record)
    read = keys.RECORD_KEYS | shape.keys
    unread = list(keys.unread_keys(record, read, shape.turns_key, shape.turn_keys))
    keys.refuse_unsupported(unread, read)
    turns, images = shape.parse(record, keys.listed_images(record))
    images = _stated_images(images)
    keys.refuse_unread_pictures(unread, images)
    turns = [Turn(turn.role, turn.text.strip(), turn.supervised) for turn in turns]
    check_turns(turns)
    turns = _with_system(turns, record)
    keys.refuse_unused_texts(unread, turns)
    check_placeholders(turns, len(images))
    return Sample(record_id(record, default_id), tuple(map(pictures.picture, images)), tuple(turns))


def format_of(record: dict[str, Any]) -> Format:
    """The format that a record has, detected from its keys. Raises SampleError."""
    stated = {str(key) for key, value in record.items() if not is_missing(value)}
    if "conversations" in stated:
        return _CONVERSATIONS
    if "messages" in stated:
        return _MESSAGES
    if "texts" in stated:
        return _TEXTS
    if {"query", "response"} <= record.keys() and stated & {"query", "response"}:
        return _QUERY
    if {"instruction", "output"} <= record.keys() and stated & {"instruction", "input"}:
        return _INSTRUCTION
    raise SampleError("no_conversation", _no_conversation(record))


def unread_paths(record: Any) -> list[str]:
    """Paths of the values of a record that nothing reads, such as `conversations[].score`. Each path once."""
    if not isinstance(record, dict):
        return []
    try:
        shape = format_of(record)
    except SampleError:
        return []
    unread = keys.unread_keys(record, keys.RECORD_KEYS | shape.keys, shape.turns_key, shape.turn_keys)
    return list(dict.fromkeys(shortened(each.path, 100) for each in unread))


def record_id(record: Any, default_id: str) -> str:
    """The id that a record states, valid or not, shortened; halves of characters, which no file takes, are escaped."""
    stated = record.get("id") if isinstance(record, dict) else None
    return (
        default_id if is_missing(stated) else shortened(str(stated)).encode("utf-8", "backslashreplace").decode("utf-8")
    )


def picture_markup(sample: Sample) -> str | None:
    """Markup such as `![](a.png)` or `<img>a.png</img>` in a sample without pictures: it is trained on as letters."""
    if sample.images:
        return None
    return next((found.group() for turn in sample.turns if (found := _MARKUP.search(turn.text))), None)


def is_conversation(record: dict[str, Any]) -> bool:
    """True if a record has the shape of a training record; a question of an evaluation has not."""
    if any(record.get(key) is not None for key in ("conversations", "messages", "texts")):
        return True
    try:
        return bool(format_of(record))
    except SampleError:
        return False


def images_beside(record: dict[str, Any], read: Collection[str], turns: Sequence[Turn]) -> list[Any]:
    """The values of the images of a record that is no conversation.

    Args:
        read: its keys that are read, besides those of every format.
        turns: what is made of it.

    Raises:
        SampleError: another key holds a picture, a video or a sound, or changes the meaning.
    """
    read = keys.RECORD_KEYS | set(read)
    unread = list(keys.unread_keys(record, read, None, frozenset()))
    keys.refuse_unsupported(unread, read)
    keys.refuse_unused_texts(unread, turns)
    images = _stated_images(keys.listed_images(record))
    keys.refuse_unread_pictures(unread, images)
    return images


def system_turn(record: dict[str, Any]) -> tuple[Turn, ...]:
    """The system turn that a record states by a key, or nothing. Raises SampleError."""
    stated = [(key, record[key]) for key in keys.SYSTEM_KEYS if not is_missing(record.get(key))]
    for key, value in stated:
        if not isinstance(value, str):
            raise SampleError("not_text", f'"{key}" is {value!r:.60}, not a string')
        check_unicode(value, f'"{key}"')
    if len({value.strip() for _, value in stated}) > 1:
        raise SampleError("unsupported_key", f"{' and '.join(key for key, _ in stated)} differ; keep one of them")
    return (Turn("system", stated[0][1].strip()),) if stated else ()


def _with_system(turns: list[Turn], record: dict[str, Any]) -> list[Turn]:
    """The turns after the system turn that the record states by a key. Raises SampleError."""
    system = system_turn(record)
    if not system or turns[0].role != "system":
        return [*system, *turns]
    if turns[0].text != system[0].text:
        raise SampleError("unsupported_key", '"system" and the first turn are different system texts; keep one of them')
    return turns


def _stated_images(images: list[Any]) -> list[Any]:
    """The values that name an image. Raises SampleError for a video or a sound."""
    images = [image for image in images if not is_missing(image)]
    for image in images:
        if isinstance(image, list | dict):  # may hold several, so it must be refused before images are counted
            content_and_name(image)
    if any(map(names_media, images)):
        raise SampleError(
            "video_or_sound", "an image is a video or a sound; llava_train trains on pictures and text only"
        )
    return images


def _no_conversation(record: dict[str, Any]) -> str:
    """Why a record has no conversation: the keys that it has, the formats that are known, and what to do."""
    if not record:
        return f"the record is empty; wanted {_KNOWN}"
    empty = [name for name in ("conversations", "messages", "texts") if name in record]
    if empty:
        return f'"{empty[0]}" is missing, empty or not a list'
    listed = ", ".join(f'"{shortened(str(key), 40)}"' for key in list(record)[:10])
    more = f" and {len(record) - 10:,} more" if len(record) > 10 else ""
    return f"no conversation; found the keys {listed}{more}; wanted {_KNOWN}{_advice(record)}"


def _advice(record: dict[str, Any]) -> str:
    """Advice on a record of an unknown format, as the end of a message; empty where there is none."""
    by_name = {str(key).lower(): key for key in record}
    for name in ("conversations", "messages", "texts", "conversation", "dialog", "dialogue", "chat"):
        if name in by_name and by_name[name] not in ("conversations", "messages", "texts"):
            return f'. Name the key "{by_name[name]}" "conversations" or "messages"'
    lists = [key for key, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return f'. If the records are the list under "{shortened(lists[0], 40)}", save that list alone'
    if all(isinstance(value, dict) for value in record.values()):
        inner: Sequence[Any] = list(record.values())
        if all(set(map(str, value)) == set(map(str, inner[0])) for value in inner) and any(
            str(key).isdigit() for key in inner[0]
        ):
            return '. These are columns of a table: write one record a row (pandas: to_json(orient="records"))'
        return ". If each value is a record, save the values as a list"
    question = next((by_name[name] for name in _QUESTION_KEYS if name in by_name), None)
    answer = next((by_name[name] for name in _ANSWER_KEYS if name in by_name and by_name[name] != question), None)
    if question and answer:
        return f'. Name "{question}" "query" and "{answer}" "response"'
    return ""
