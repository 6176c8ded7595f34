"""What lmms-eval calls for a task of ours, copied beside the task: its environment lacks this package.

A question is `{"id", "question", "answers", "images": [path, ...]}`; the question holds `<image>` once for each image.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import Image, ImageOps


def doc_to_visual(question: dict[str, Any]) -> list[Image.Image]:
    """The pictures, upright and RGB as in training."""
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in question["images"]]


def doc_to_text(question: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question as one text, for models that lmms-eval calls simple."""
    return str(question["question"])


def doc_to_messages(
    question: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The question as a chat, its pictures in their places."""
    pictures = iter(doc_to_visual(question))
    pieces = [piece.strip() for piece in re.split("(<image>)", question["question"])]
    content = [
        {"type": "image", "url": next(pictures)} if piece == "<image>" else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
    return [{"role": "user", "content": content}]


def process_results(question: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As `evaluate --metric exact`: an answer is one of the references, but for case and white space around it."""
    references = [reference.strip().casefold() for reference in question["answers"]]
    return {"exact_match": float(results[0].strip().casefold() in references)}
