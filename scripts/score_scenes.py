"""Scores a model on held-out scenes, with plain transformers.

    python scripts/score_scenes.py --model runs/small-stage2/model --data data/scenes/held_out.json

Every question is asked on its own, and an answer counts when it is the expected one to the letter. Beside the
right picture the model gets a blank one, and the table shows what always giving the most frequent answer
would reach: only what lies above both was seen in the picture. Existence and count are answered with what is seen
and then with a verdict (`blue square: no`); a second table judges the verdicts alone, which are easier to guess.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_train.files import sha256

BLANK = Image.new("RGB", (168, 168), (128, 128, 128))
WAYS = ("picture", "blank", "most frequent")


@dataclass(frozen=True)
class Question:
    """A question about a scene of `n_objects` objects."""

    image: Path
    text: str
    expected: str
    kind: str
    n_objects: int


def read_questions(path: Path) -> list[Question]:
    """The questions of a file that `data/draw_scenes.py` drew."""
    questions = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        values = [turn["value"] for turn in row["conversations"]]
        for kind, asked, expected in zip(row["kinds"], values[::2], values[1::2], strict=True):
            text = asked.replace("<image>", "").strip()
            questions.append(Question(path.parent / row["image"], text, expected, kind, row["n_objects"]))
    return questions


class Asker:
    """Greedy answers of a model, in batches."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(self.device).eval()
        self.batch_size = batch_size

    def answers(self, pairs: list[tuple[Image.Image | Path, str]], what: str) -> list[str]:
        """An answer for each (picture, question)."""
        starts = range(0, len(pairs), self.batch_size)
        batches = (pairs[start : start + self.batch_size] for start in starts)
        return [a for batch in track(batches, what, total=len(starts), transient=True) for a in self._batch(batch)]

    @torch.inference_mode()
    def _batch(self, pairs: list[tuple[Image.Image | Path, str]]) -> Iterator[str]:
        pictures = [Image.open(p).convert("RGB") if isinstance(p, Path) else p for p, _ in pairs]
        prompts = [self._prompt(text) for _, text in pairs]
        inputs = self.processor(
            text=prompts, images=pictures, padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        for tokens in output[:, inputs.input_ids.shape[1] :]:
            yield self.processor.decode(tokens, skip_special_tokens=True).strip()

    def _prompt(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def ask_all(asker: Asker, questions: list[Question]) -> dict[str, list[str]]:
    """The answers to all questions: with the `picture`, with a `blank` one, and the `most frequent` answer."""
    seen = asker.answers([(question.image, question.text) for question in questions], "with the picture")
    texts = sorted({question.text for question in questions})
    unseen = dict(zip(texts, asker.answers([(BLANK, text) for text in texts], "with a blank one"), strict=True))
    blank = [unseen[question.text] for question in questions]
    return {"picture": seen, "blank": blank, "most frequent": most_frequent(questions)}


def most_frequent(questions: Iterable[Question]) -> list[str]:
    """For each question the most frequent answer of its kind and number of objects: the best guess without one."""
    counts: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[question.kind, question.n_objects][question.expected] += 1
    return [counts[question.kind, question.n_objects].most_common(1)[0][0] for question in questions]


def verdicts(questions: list[Question], answers: dict[str, list[str]]) -> tuple[list[Question], dict[str, list[str]]]:
    """The same with `no` in place of `blue square: no`."""
    short = [replace(question, expected=_verdict(question.expected)) for question in questions]
    given = {way: [_verdict(answer) for answer in answers[way]] for way in WAYS}
    return short, {**given, "most frequent": most_frequent(short)}


def _verdict(answer: str) -> str:
    return answer.rpartition(": ")[2]


def asked_before(path: Path, fingerprint: str) -> dict[str, list[str]] | None:
    """The answers in the file, when they are of this model and these questions."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["fingerprint"] != fingerprint:
        return None
    return {way: [question["answers"][way] for question in record["questions"]] for way in WAYS}


def write_answers(path: Path, fingerprint: str, questions: list[Question], answers: dict[str, list[str]]) -> None:
    """Keeps every question with its answers, to be read."""
    rows = [
        {
            "image": str(question.image),
            "question": question.text,
            "expected": question.expected,
            "answers": {way: given[i] for way, given in answers.items()},
        }
        for i, question in enumerate(questions)
    ]
    path.write_text(json.dumps({"fingerprint": fingerprint, "questions": rows}, indent=1) + "\n", encoding="utf-8")


def fingerprint_of(model: Path, data: Path) -> str:
    """Changes with the questions and with any file of the model."""
    files = [data, *sorted(path for path in model.iterdir() if path.is_file())]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()


def table_of(questions: list[Question], answers: dict[str, list[str]], what: str = "exact match") -> Table:
    """Accuracy in percent by kind of question and number of objects."""
    sizes = sorted({question.n_objects for question in questions})
    table = Table("question", title=f"Held-out {what}, %: {' / '.join(answers)} answer")
    for size in sizes:
        table.add_column(f"{size} object{'s' if size > 1 else ''}", justify="right")
    kinds = sorted({question.kind for question in questions})
    for kind in [*kinds, None]:
        cells = [cell_of(questions, answers, kind, size) for size in sizes]
        table.add_row(kind or "all", *cells, end_section=kind == kinds[-1])
    return table


def cell_of(questions: list[Question], answers: dict[str, list[str]], kind: str | None, size: int) -> str:
    chosen = [i for i, q in enumerate(questions) if q.n_objects == size and kind in (None, q.kind)]
    if not chosen:
        return "-"
    n_right = [sum(given[i] == questions[i].expected for i in chosen) for given in answers.values()]
    return " / ".join(f"{100 * n / len(chosen):.0f}" for n in n_right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model/ folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="held_out.json of data/draw_scenes.py")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    for path in (arguments.model / "config.json", arguments.data):
        if not path.is_file():
            raise SystemExit(f"error: {path} is missing; run scripts/quickstart.sh")
    questions = read_questions(arguments.data)
    path = arguments.model.parent / "held_out_answers.json"
    fingerprint = fingerprint_of(arguments.model, arguments.data)
    answers = asked_before(path, fingerprint)
    if answers is None:
        answers = ask_all(Asker(arguments.model, arguments.batch_size), questions)
        write_answers(path, fingerprint, questions, answers)
    Console().print(table_of(questions, answers))
    Console().print(table_of(*verdicts(questions, answers), what="verdict"))
    print(f"{len(questions)} questions; they and their answers are in {path}")


if __name__ == "__main__":
    main()
