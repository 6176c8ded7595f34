"""Records that are questions and answers under keys of their own.

    texts        the_cauldron and FineVision: `{"images": [...], "texts": [{"user", "assistant"}, ...]}`; the images
                 come first
    instruction  Alpaca: `{"instruction", "input", "output", "system", "history": [[question, answer], ...], "images"}`;
                 the question is the instruction and, on a line of its own, the input
    query        ms-swift: `{"query", "response", "system", "history", "images"}`

In the last two an `<image>` says where an image goes; without any the images come first.
"""

from __future__ import annotations

from typing import Any

from llava_train.data.formats.turns import (
    checked_text,
    images_first,
    images_first_unless_placed,
    is_supervised,
    question_and_answer,
    refuse_placeholders,
)
from llava_train.data.formats.values import as_rows, is_missing
from llava_train.data.problems import SampleError
from llava_train.data.samples import Turn


def parse_texts(record: dict[str, Any], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns and images of `{"texts": [{"user", "assistant"}, ...]}`. Raises SampleError."""
    texts = as_rows(record["texts"])
    if not isinstance(texts, list) or not texts:
        raise SampleError("no_conversation", '"texts" is empty or not a list')
    turns = []
    for number, pair in enumerate(texts, start=1):
        if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
            raise SampleError("malformed_turn", f'turn {number}: a turn is {{"user": text, "assistant": text}}')
        supervised = is_supervised(pair, "assistant", number)
        turns += question_and_answer(pair["user"], pair["assistant"], 2 * number - 1, supervised)
    refuse_placeholders(turns)
    return images_first(turns, sum(not is_missing(image) for image in images)), images


def parse_instruction(record: dict[str, Any], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns and images of Alpaca's `{"instruction", "input", "output"}`. Raises SampleError."""
    turns = _history(record)
    asked = [record[key] for key in ("instruction", "input") if not is_missing(record.get(key))]
    question = "\n".join(checked_text(text, len(turns) + 1) for text in asked)
    return _with_last(turns, question, record.get("output"), images)


def parse_query(record: dict[str, Any], images: list[Any]) -> tuple[list[Turn], list[Any]]:
    """Turns and images of ms-swift's `{"query", "response"}`. Raises SampleError."""
    question = record.get("query")
    return _with_last(_history(record), "" if is_missing(question) else question, record.get("response"), images)


def _with_last(turns: list[Turn], question: Any, answer: Any, images: list[Any]) -> tuple[list[Turn], list[Any]]:
    turns = [*turns, *question_and_answer(question, answer, len(turns) + 1)]
    return images_first_unless_placed(turns, sum(not is_missing(image) for image in images)), images


def _history(record: dict[str, Any]) -> list[Turn]:
    """The turns of `[[question, answer], ...]`. Raises SampleError."""
    history, turns = record.get("history"), list[Turn]()
    if is_missing(history) or history == "[]":
        return turns
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise SampleError("malformed_turn", f'"history" is a list of [question, answer], not of {pair!r:.60}')
        question, answer = pair
        turns += question_and_answer(question, answer, len(turns) + 1)
    return turns
