"""Questions with what they are measured by, from the files of LLaVA's evaluations or from training data.

The shape of a record is told by its keys. As LLaVA's scripts ask, `{"question_id", "image", "text", "category"}`, with

    vqa, exact, anls   `answers` (texts, or VQA's `{"answer": text}`) or `answer`
    pope               `label` (as POPE's own files) or `answer`: yes or no
    caption            `captions`, `caption`, `answers` or `answer`
    choice             `options`, and `answer`: the text of one, its number from 0, or its letter; refused where it
                       may mean two: 2 of the options "1", "2" and "3"

or a training record with its conversation (`data.samples`): each question is asked on its own, and the assistant's text
is the reference; `categories` has one for each question.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_train.data.formats import images_beside, is_conversation, system_turn
from llava_train.data.formats.turns import first_stated
from llava_train.data.formats.values import is_missing
from llava_train.data.paths import advice_on_path
from llava_train.data.pictures import EmbeddedPicture, Picture
from llava_train.data.samples import IMAGE_PLACEHOLDER, Sample, Turn, check_placeholders, check_unicode
from llava_train.data.sources import Source, open_source
from llava_train.errors import UserError
from llava_train.use.metrics import Metric

_REFERENCES: dict[Metric, tuple[str, ...]] = {
    "vqa": ("answers", "answer"),
    "exact": ("answers", "answer"),
    "anls": ("answers", "answer"),
    "pope": ("label", "answer"),
    "caption": ("captions", "caption", "answers", "answer"),
    "choice": ("answer",),
}
_QUESTION_KEYS = {"question_id", "text", "question", "category", "categories", "options"} | {
    key for keys in _REFERENCES.values() for key in keys
}


class QuestionError(UserError):
    """A record that cannot be asked or measured. What `read_questions` raises names file and line."""


@dataclass(frozen=True)
class Item:
    """A question and what its answer is measured by.

    The texts of `turns` hold `<image>` once for each of `pictures`, in order.
    """

    id: Any
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    references: tuple[str, ...]
    where: str
    """File and line."""
    options: tuple[str, ...] = ()
    category: str | None = None

    @property
    def prompt(self) -> str:
        """What is asked, without placeholders."""
        return self.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def group(self) -> Hashable:
        """What the item shares with others that are not independent of it: its pictures."""
        has_names = self.pictures and not any(isinstance(picture, EmbeddedPicture) for picture in self.pictures)
        return tuple(map(str, self.pictures)) if has_names else self.where


def read_questions(path: Path, metric: Metric, images: str | None = None, suffix: str = "") -> list[Item]:
    """The questions of a file, in its order.

    Args:
        images: folder or archive that image paths are relative to; default: the folder of `path`.
        suffix: follows each question on a line of its own.

    Raises:
        DataError: the file or the images cannot be opened.
        QuestionError: a record that is no question, or lacks what the metric measures by.
    """
    for given in (path, Path(images or path)):
        if not given.exists():
            advice = advice_on_path(str(given))
            raise QuestionError(f"{given}: there is no such file or folder{'; ' * bool(advice)}{advice}")
    source, items = open_source(path, images), list[Item]()
    for index in range(len(source)):
        line = source.line(index)
        where = f"{path}:{line}" if line else f"{path}, record {index}"
        try:
            found = _items_of(source, index, metric, suffix, where)
            for item in found:
                _check_texts(item)
            items += found
        except UserError as error:
            raise QuestionError(f"{where}: {error}") from error
    return items


def first_question(sample: Sample, where: str, metric: Metric | None) -> Item:
    """The first question of a training sample. Raises QuestionError where the metric cannot measure its answer."""
    try:
        return replace(next(_of_sample(sample, metric, "", where, [None])), id=sample.id)
    except StopIteration:
        raise QuestionError(f"{where}: every answer is marked as not trained on, so nothing measures by it") from None
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from error


def _items_of(source: Source, index: int, metric: Metric, suffix: str, where: str) -> list[Item]:
    record = source.records[index]
    if not isinstance(record, dict):
        raise QuestionError(f"a question is a JSON object, not {type(record).__name__}")
    if is_conversation(record):
        categories = record.get("categories")
        categories = categories if categories and isinstance(categories, list) else [record.get("category")]
        return list(_of_sample(source.parse(record, index), metric, suffix, where, categories))
    return [_of_question(record, source, index, metric, suffix, where)]


def _check_texts(item: Item) -> None:
    """Refuses what the model cannot be asked, or what the answers and the scores cannot name. Raises SampleError."""
    named = {"id": [str(item.id)], "text": [item.prompt], "options": item.options, "category": [item.category or ""]}
    for name, texts in named.items():
        for text in texts:
            check_unicode(text, name)


def _of_sample(
    sample: Sample, metric: Metric | None, suffix: str, where: str, categories: Sequence[Any]
) -> Iterator[Item]:
    """Each pair of a conversation, asked on its own with all the pictures so far."""
    system = tuple(turn for turn in sample.turns if turn.role == "system")
    spoken, n_shown = sample.turns[len(system) :], 0
    for number, (asked, answered) in enumerate(zip(spoken[::2], spoken[1::2], strict=True)):
        if not answered.supervised:
            n_shown += asked.text.count(IMAGE_PLACEHOLDER)
            continue
        options, references = _measured_by({"answer": answered.text}, metric) if metric else ((), (answered.text,))
        n_shown += asked.text.count(IMAGE_PLACEHOLDER)
        yield Item(
            sample.id if len(spoken) == 2 else f"{sample.id}-{number}",
            (*system, Turn("user", _asked(asked.text, n_shown, suffix))),
            sample.images[:n_shown],
            references,
            where,
            options,
            _category(categories[number] if number < len(categories) else categories[-1]),
        )


def _of_question(record: dict[str, Any], source: Source, index: int, metric: Metric, suffix: str, where: str) -> Item:
    text = first_stated(record, "text", "question")
    if not isinstance(text, str):
        raise QuestionError('no question: wanted "text", or the "conversations" of a training record')
    system = system_turn(record)
    listed = images_beside(record, _QUESTION_KEYS, (*system, Turn("user", text)))
    pictures = tuple(map(source.pictures.picture, listed))
    turns = (*system, Turn("user", _asked(text, len(pictures), suffix)))
    check_placeholders(turns, len(pictures))
    options, references = _measured_by(record, metric)
    ids = [record[key] for key in ("question_id", "id") if not is_missing(record.get(key))]
    return Item(
        ids[0] if ids else index, turns, pictures, references, where, options, _category(record.get("category"))
    )


def _asked(text: str, n_pictures: int, suffix: str) -> str:
    """The text with a placeholder for each picture: its own ones, and before it those that it lacks."""
    text = f"{IMAGE_PLACEHOLDER}\n" * (n_pictures - text.count(IMAGE_PLACEHOLDER)) + text
    return f"{text}\n{suffix}" if suffix else text


def _category(value: Any) -> str | None:
    return None if is_missing(value) else str(value)


def _measured_by(record: dict[str, Any], metric: Metric) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options, of a choice, and references. Raises QuestionError."""
    keys = _REFERENCES[metric]
    given = {key: record.get(key) for key in keys}
    key = next(
        (key for key, value in given.items() if not is_missing(value) or (value and isinstance(value, list))), None
    )
    if key is None:
        raise QuestionError(f"metric {metric} measures by {' or '.join(keys)}, which is missing")
    if metric == "choice":
        return _choice(record.get("options"), record[key])
    references = _texts(record[key], key)
    if metric == "pope":
        references = tuple(label.strip().lower() for label in references)
        if references not in (("yes",), ("no",)):
            raise QuestionError(f'{key}: {record[key]!r}; wanted "yes" or "no"')
    return (), references


def _texts(value: Any, key: str) -> tuple[str, ...]:
    texts = []
    for each in value if isinstance(value, list) else [value]:
        text = each.get("answer") if isinstance(each, dict) else each
        if not isinstance(text, str | int | float) or isinstance(text, bool) or text != text:  # NaN, of pandas
            raise QuestionError(f"{key}: {value!r:.80} is neither a text nor a list of texts")
        texts.append(str(text))
    return tuple(texts)


def _choice(options: Any, answer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options and, as the one reference, the right one of them."""
    if isinstance(options, dict):
        letters, listed = [str(letter) for letter in options], list(options.values())
    else:
        listed = options if isinstance(options, list) else []
        letters = [chr(ord("A") + number) for number in range(len(listed))]
    if (
        len(listed) < 2
        or not all(isinstance(option, str) and option for option in listed)
        or len({*listed}) < len(listed)
    ):
        raise QuestionError("options: wanted two or more different texts")
    return tuple(listed), (listed[_right_option(listed, letters, answer)],)


def _right_option(options: list[str], letters: list[str], answer: Any) -> int:
    """Return the index of the option that an answer means. Raises QuestionError where that is none or several."""
    meanings = _meanings(options, letters, answer)
    possible = sorted({*meanings.values()})
    if len(possible) == 1:
        return possible[0]
    if not possible:
        raise QuestionError(f"answer: {answer!r} is none of the options: not a text, number from 0, or letter")
    read_as = " or ".join(f"{options[index]!r} ({way})" for way, index in meanings.items())
    names = [_name_of(options, letters, index) for index in possible]
    advice = " or ".join(f"{name!r} for {options[index]!r}" for name, index in zip(names, possible, strict=True))
    if None in names:
        advice = "the options as an object whose letters are no texts of it"
    raise QuestionError(f"answer: {answer!r} may mean {read_as}; write {advice}")


def _meanings(options: list[str], letters: list[str], answer: Any) -> dict[str, int]:
    """Return the index of the option that an answer means, by the way to read it.

    What differs from an option in case, white space or as a number is written (`1.0`) makes another reading doubtful,
    but is none by itself: 'A' of the options 'b' and 'a' may be a letter or a text.
    """
    is_number, found = isinstance(answer, int) and not isinstance(answer, bool), {}
    if is_number and 0 <= answer < len(options):
        found["by its number from 0"] = answer
    if (letter := str(answer) if is_number else answer) in letters:
        found["by its letter"] = letters.index(letter)
    if answer in options:
        found["by its text"] = options.index(answer)
    elif is_number or found:
        alike = [index for index, option in enumerate(options) if _is_like(option, answer)]
        found |= {"by its text": alike[0]} if alike else {}
    return found


def _name_of(options: list[str], letters: list[str], index: int) -> str | int | None:
    """Return what means an option and no other: its text, number or letter."""
    names: tuple[str | int, ...] = options[index], index, letters[index]
    return next((name for name in names if {*_meanings(options, letters, name).values()} == {index}), None)


def _is_like(option: str, answer: Any) -> bool:
    if option.strip().casefold() == str(answer).strip().casefold():
        return True
    try:
        return float(option) == float(answer)
    except (TypeError, ValueError):
        return False
