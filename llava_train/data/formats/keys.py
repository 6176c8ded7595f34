"""The keys of a record that its format does not read: harmless ones are counted, others are refused.

A key that nothing reads must not hold what the sample needs. Refused are

- a picture: any value that names one (`"img": "a.png"`), unless it is another name of a picture that the record states;
- a video or a sound;
- what changes the meaning of the conversation and is not supported: tools, reasoning, preferences.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from llava_train.data.formats.values import (
    as_rows,
    is_media_key,
    is_missing,
    is_picture_key,
    names_media,
    picture_values,
    words_of,
)
from llava_train.data.problems import SampleError, shortened
from llava_train.data.samples import Turn

IMAGE_KEYS = ("image", "images")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
LOSS_KEYS = frozenset({"loss", "train", "weight", "loss_weight", "loss_scale", "trainable", "supervised"})
"""Flags of a turn: whether it is trained on."""

RECORD_KEYS = frozenset({"id", *IMAGE_KEYS, *SYSTEM_KEYS})
"""Keys that every format reads."""
TURN_KEYS = frozenset({"from", "role", "value", "content", *LOSS_KEYS})
PART_KEYS = frozenset({"type", "text", "value"})
IMAGE_PART_KEYS = frozenset({"type", "image", "path", "url", "image_url", "value", "index"})

_IN_ANSWER = "is not read; write what the model should say into the answer, or remove the key"
_NO_TOOLS = "is not supported: tool calls are not trained; remove such records"
_NO_PREFERENCES = "is not supported: preferences are not trained; keep only the chosen answers, as conversations"
_NO_WEIGHT = 'is not supported for a record; mark its turns ("loss": false), or remove the record or the key'
_OTHER_CONVERSATION = "holds another conversation, which is not read; keep one of them"
_AS_SYSTEM = 'is not read; name it "system", as a key of the record'
_TURN_LEFT_OUT = 'is not read; to leave a turn out of training, write "loss": false'
_AS_HISTORY = 'is read only with "instruction" or "query"; write its turns into the conversation'
_ITS_TEXT = "responses?|answers?|messages?|conversations?|outputs?|texts?|images?"
_MEANINGS = {
    re.compile(pattern): problem
    for pattern, problem in (
        (
            "(reasoning|thinking|thoughts?|think|cot|chain ?of ?thoughts?)( ?(content|texts?|details|blocks|trace))?",
            _IN_ANSWER,
        ),
        ("(available )?(tools|functions)( (definitions|schemas?))?", _NO_TOOLS),
        ("(tools?|functions?) ?(calls?|call ?id|uses?|results?|responses?|outputs?)", _NO_TOOLS),
        (f"(chosen|rejected|reject)( ?({_ITS_TEXT}))?|kto ?(tag|label)", _NO_PREFERENCES),
        ("conversations?|messages", _OTHER_CONVERSATION),
        ("((chat|conversations?|dialogs?|dialogues?|messages?) ?)?history", _AS_HISTORY),
        ("(system|sys) ?(prompts?|messages?|msg|texts?|content|instructions?)?", _AS_SYSTEM),
    )
}
"""Keys that nothing reads but that change the meaning, as their words in lower case."""
_LOSS_FLAG = re.compile(
    "((is|do|should|compute|calculate|with|in|sample) )?"
    "(loss|train|training|trained|trainable|weights?|supervised?)"
    "( (masks?|flag|on|on turn|turn|details?|weights?))?"
)
_MASK = re.compile("(is )?(mask|masked|masking|ignored?|skip)|(no|ignore|skip|mask) ?(loss|train|training)")
"""Flags of a turn with the meaning turned around."""
_NOTHING = ("[]", "{}", "null", "none")
"""Texts of columns that hold JSON, where there is nothing."""


@dataclass(frozen=True)
class Unread:
    """A key that nothing reads, and its value."""

    key: str
    """As the record has it."""
    value: Any
    path: str
    """Path of the key: `width`, `conversations[].score`, `messages[].content[].detail`."""
    where: str
    """The turn, in words; empty for a key of the record."""
    is_of_record: bool

    def __str__(self) -> str:
        return f'{self.where}key "{shortened(self.key, 60)}"'


def unread_keys(
    record: dict[str, Any], read: Collection[str], turns_key: str | None, turn_keys: Set[str]
) -> Iterator[Unread]:
    """Yields the keys with a value that are not read, of the record, of its turns and of the parts of their content.

    Args:
        read: keys of the record that its format reads.
        turns_key: where the turns are, if they are objects.
        turn_keys: keys of a turn that the format reads.
    """
    for key, value in _not_read(record, read):
        yield Unread(key, value, key, "", is_of_record=True)
    turns = as_rows(record.get(turns_key)) if turns_key else None
    for number, turn in enumerate(turns if isinstance(turns, list) else [], start=1):
        if not isinstance(turn, dict):
            continue
        for key, value in _not_read(turn, turn_keys) if turn.keys() - turn_keys else ():
            yield Unread(key, value, f"{turns_key}[].{key}", f"turn {number}: ", is_of_record=False)
        for name in ("value", "content"):
            parts = as_rows(turn.get(name))
            for part in parts if isinstance(parts, list) else []:
                for key, value in _not_read_of_part(part) if isinstance(part, dict) else ():
                    path = f"{turns_key}[].{name}[].{key}"
                    yield Unread(key, value, path, f"turn {number}: ", is_of_record=False)


def _not_read_of_part(part: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    return _not_read(part, IMAGE_PART_KEYS if part.get("type") in ("image", "image_url") else PART_KEYS)


def _not_read(holder: dict[Any, Any], read: Collection[str]) -> Iterator[tuple[str, Any]]:
    for key, value in holder.items():
        if key not in read and not is_missing(value):
            yield str(key), value


def refuse_unsupported(unread: Sequence[Unread], read: Collection[str]) -> None:
    """Refuses keys that hold a video or a sound, or that change what the conversation means. Raises SampleError."""
    for each in unread:
        if is_media_key(each.key, each.value) or names_media(each.value):
            raise SampleError(
                "video_or_sound",
                f"{each} holds a video or a sound; llava_train trains on pictures and text only: remove such records, "
                "or the key where the text does not need it",
            )
        if (problem := _change_of_meaning(each, read)) is not None:
            raise SampleError("unsupported_key", f"{each} {problem}")


def _change_of_meaning(each: Unread, read: Collection[str]) -> str | None:
    """The problem with a key that changes the meaning of the record; None where it does not."""
    words = " ".join(words_of(each.key))
    is_loss_flag = _LOSS_FLAG.fullmatch(words) is not None
    is_label = words in ("label", "kto label", "kto tag")
    if each.value is False and not is_label and not is_loss_flag:
        return None
    if isinstance(each.value, str) and each.value.strip().lower() in _NOTHING:
        return None
    if is_loss_flag and each.value in (True, 1):
        return None
    if each.is_of_record:
        if is_label and each.value is False:
            return "marks the answer as a bad one, and preferences are not trained; remove the record or the key"
        if is_loss_flag:
            return _NO_WEIGHT
    elif is_loss_flag or _MASK.fullmatch(words):
        near = next((key for key in sorted(LOSS_KEYS) if _plain(each.key) == _plain(key)), None)
        return f'is not read; name it "{near}"' if near else _TURN_LEFT_OUT
    near = next((key for key in read if _plain(each.key) == _plain(key) and key not in IMAGE_KEYS), None)
    if near and each.is_of_record:
        return f'is not read; name it "{near}"'
    return _problem_of_meaning(words)


@lru_cache(maxsize=1024)
def _problem_of_meaning(words: str) -> str | None:
    return next((problem for pattern, problem in _MEANINGS.items() if pattern.fullmatch(words)), None)


def refuse_unused_texts(unread: Sequence[Unread], turns: Sequence[Turn]) -> None:
    """Refuses an instruction that no turn holds, and boxes for marks in the text. Raises SampleError."""
    for each in unread:
        is_instruction = words_of(each.key)[-1:] in (("instruction",), ("instructions",)) and isinstance(
            each.value, str
        )
        if is_instruction and not any(each.value.strip() in turn.text for turn in turns):
            raise SampleError(
                "unsupported_key",
                f'{each} holds an instruction that no turn has; write it as "system", or into the conversation',
            )
        if _plain(each.key) == "objects" and any(
            mark in turn.text for turn in turns for mark in ("<bbox>", "<ref-object>")
        ):
            raise SampleError(
                "unsupported_key",
                f"{each} is not read, and the text refers to it by <bbox> or <ref-object>; write the numbers and names "
                "into the text",
            )


def refuse_unread_pictures(unread: Sequence[Unread], images: Sequence[Any]) -> None:
    """Refuses keys that name a picture which is none of `images`, those that the record states. Raises SampleError.

    With pictures stated, other keys of the record often hold their names again, or what was made of them, such as a
    thumbnail in bytes.
    """
    for each in unread:
        named = list(picture_values(each.value))
        by_key = is_picture_key(each.key, each.value)
        may_be_embedded = each.is_of_record and not by_key
        if images and _are_known(named, images, each.is_of_record, may_be_embedded):
            continue
        if named or by_key:
            advice = "name the key" if each.is_of_record else "write it as a part of the content, or in the record's"
            raise SampleError(
                "unread_picture",
                f'{each} names a picture, but is not read; {advice} "image" (a list for several), or remove the key',
            )


def _are_known(named: Sequence[str | bytes], images: Sequence[Any], of_record: bool, may_be_embedded: bool) -> bool:
    """True if names may all be those of stated pictures: the same file names, or addresses.

    A picture that the record holds as bytes has no name to compare, so a name of the record may be its name.
    """
    if any(isinstance(name, bytes) for name in named) and not may_be_embedded:
        return False
    stems, n_unnamed = set(), 0
    for image in images:
        if isinstance(image, dict):
            image = image.get("path")
        if isinstance(image, str) and len(image) < 4096 and not image.startswith("data:"):
            stems.add(_stem(image))
        else:
            n_unnamed += of_record
    names = [name for name in named if isinstance(name, str)]
    return sum("://" not in name and _stem(name) not in stems for name in names) <= n_unnamed


def _stem(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).stem.lower()


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "").replace(" ", "")


def listed_images(record: dict[str, Any]) -> list[Any]:
    """The values of `image` or `images`, missing ones included. Raises SampleError where both differ."""
    stated = [record[key] for key in IMAGE_KEYS if not is_missing(record.get(key))]
    lists = [value if isinstance(value, list) else [value] for value in stated]
    if len(lists) == 2 and not same_value(*lists):
        raise SampleError("unread_picture", 'both "image" and "images" name pictures; write all of them as "images"')
    return lists[0] if lists else []


def same_value(one: Any, other: Any) -> bool:
    """True if two values are the same; Arrow's buffers cannot be compared with other types."""
    if isinstance(one, pa.Buffer) or isinstance(other, pa.Buffer):
        return isinstance(one, pa.Buffer) and isinstance(other, pa.Buffer) and one.equals(other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return type(one) is type(other) and bool(one == other)
