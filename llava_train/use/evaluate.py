"""A model's answers to a file of questions, and what they are worth.

    the questions are read, whole -> rank 0 locks the answers file -> the answers that are there already -> each rank
    answers its share, batch by batch, and appends -> rank 0 puts the parts together -> scores

What can be wrong with the questions or the answers file is told before the model is loaded. With `blind` the same
questions are asked again about a blank picture: only what lies above that, and above always giving the most
frequent answer, was seen in the picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from llava_train.data.images import decode_image
from llava_train.data.problems import SampleError
from llava_train.errors import UserError
from llava_train.files import file_facts
from llava_train.model.weights import ADAPTER_FOLDER, RESULT_FOLDER
from llava_train.stage_file import RUN_CARD
from llava_train.use.answers import (
    PREFIX,
    SCORES_SUFFIX,
    Answer,
    AnswersError,
    AnswersFile,
    digest_of_model,
    digest_of_questions,
)
from llava_train.use.llava import LLaVA, Precision, Question
from llava_train.use.metrics import Metric
from llava_train.use.questions import Item, read_questions
from llava_train.use.ranks import Ranks, joined_ranks
from llava_train.use.report import BLANK, PICTURE, Report, report_on

_BLANK_SIDE = 224
"""Pixels. Of the colour that LLaVA pads with, the encoder sees the same blank square whatever the size."""


class EvaluationError(UserError):
    """A question that the model cannot be asked. The message names it."""


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how."""

    model: str
    """As `LLaVA.from_pretrained` takes it."""
    data: Path
    metric: Metric
    images: str | None = None
    """Folder or archive of the pictures; default: the folder of `data`."""
    answers: Path | None = None
    prompt_suffix: str = ""
    max_new_tokens: int = 128
    batch_size: int = 8
    limit: int | None = None
    """Only the first so many questions; a later run without it goes on from there."""
    blind: bool = False
    skip_bad: bool = False
    """Leave out questions whose picture cannot be read, and list them."""
    overwrite: bool = False
    """Start anew; the answers that were there are kept beside, as NAME.bak."""
    device: str = "auto"
    dtype: Precision = "auto"
    chat_template: str | None = None
    """As `LLaVA.from_pretrained` takes it."""
    trust_remote_code: bool = False

    @property
    def name(self) -> str:
        """The model's name in the answers file and in tables."""
        path = Path(self.model).absolute()
        return path.parent.name if path.name in (RESULT_FOLDER, ADAPTER_FOLDER) else path.name

    def answers_path(self, way: str) -> Path:
        """The answers file: as named, else in the run's folder, else in the current one with the model's name."""
        path = self.answers
        if path is None:
            folder, stem = Path(self.model), self.data.name.split(".")[0]
            run = next((each for each in (folder, folder.parent) if (each / RUN_CARD).is_file()), None)
            path = run / f"{PREFIX}{stem}.jsonl" if run else Path(f"{PREFIX}{self.name}-{stem}.jsonl")
        return path if way == PICTURE else path.with_name(f"{path.stem}.{way}{path.suffix}")

    @property
    def scores_path(self) -> Path:
        return self.answers_path(PICTURE).with_suffix(SCORES_SUFFIX)


def evaluate(plan: Evaluation, progress: Console | None = None) -> Report | None:
    """Answers what is not answered yet, and scores. Every rank must call it; only rank 0 gets the report.

    Args:
        progress: where rank 0 shows how far it is.

    Raises:
        DataError, QuestionError: the questions cannot be read.
        AnswersError: the answers file holds other answers, or another evaluation writes it.
        EvaluationError: a question cannot be asked, and `skip_bad` is off.
        UserError: the model cannot be loaded.
    """
    with joined_ranks() as ranks, ExitStack() as locks:
        items = ranks.on_main(lambda: read_questions(plan.data, plan.metric, plan.images, plan.prompt_suffix))
        files = ranks.on_main(lambda: _answers_files(plan, items))
        ranks.on_main(lambda: [locks.enter_context(file.locked()) for file in files.values()])
        skipped = _answer_all(plan, items, files, ranks, progress)
        report = ranks.on_main(lambda: _score(plan, items, files, skipped))
        return report if ranks.is_main else None


def print_report(plan: Evaluation, report: Report, as_json: bool) -> None:
    """Prints the scores, and what was left out."""
    if as_json:
        print(json.dumps(report.as_record(), ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    console.print(report.table())
    if report.skipped:
        console.print(f"{len(report.skipped)} questions are left out:", *report.skipped, sep="\n  ", markup=False)
    console.print(f"answers: {plan.answers_path(PICTURE)}   scores: {plan.scores_path}", highlight=False, markup=False)


def _answers_files(plan: Evaluation, items: Sequence[Item]) -> dict[str, AnswersFile]:
    """A file for each way of answering. Raises AnswersError."""
    if plan.answers_path(PICTURE).absolute() == plan.data.absolute():
        raise AnswersError(f"{plan.data} holds the questions; give --answers another name")
    origin = {
        "model": digest_of_model(plan.model, [plan.scores_path, *map(plan.answers_path, (PICTURE, BLANK))]),
        "questions": digest_of_questions(items),
        "prompt_suffix": plan.prompt_suffix,
        "dtype": plan.dtype,
        **({"chat_template": _told(plan.chat_template)} if plan.chat_template else {}),
        **({} if plan.metric == "choice" else {"max_new_tokens": plan.max_new_tokens}),
    }
    places = {"data": str(plan.data), "images": plan.images or str(plan.data.parent)}
    files = {}
    for way in (PICTURE, BLANK) if plan.blind else (PICTURE,):
        files[way] = AnswersFile(plan.answers_path(way), items, plan.name, {**origin, "way": way}, places)
        files[way].path.parent.mkdir(parents=True, exist_ok=True)
    return files


def _told(chat_template: str) -> str:
    """What the answers say of a chat template: its name, or the checksum of its file."""
    path = Path(chat_template)
    return str(file_facts(path)["xxh128"]) if path.is_file() else chat_template


def _share(items: Sequence[Item], indices: Iterable[int], ranks: Ranks) -> list[int]:
    """The indices of this rank, the longest first: a batch is of texts of like length, and all ranks have as much."""
    return sorted(indices, key=lambda index: (-len(items[index].prompt), index))[ranks.rank :: ranks.n_ranks]


def _alike(items: Sequence[Item], indices: Iterable[int], way: str) -> dict[int, list[int]]:
    """Questions that have one answer, by the first of them: blank pictures are all alike, so the words decide."""
    firsts: dict[object, int] = {}
    groups: dict[int, list[int]] = {}
    for index in indices:
        item = items[index]
        key = (item.turns, len(item.pictures), item.options) if way == BLANK else index
        groups.setdefault(firsts.setdefault(key, index), []).append(index)
    return groups


def _answer_all(
    plan: Evaluation, items: Sequence[Item], files: Mapping[str, AnswersFile], ranks: Ranks, progress: Console | None
) -> dict[int, str]:
    """Answers what is not answered yet, each rank its share. Every rank must call it.

    Returns:
        Why a question is left out, by its index.
    """
    known = ranks.on_main(lambda: {} if plan.overwrite else {way: {*file.merge()} for way, file in files.items()})
    wanted = {way: sorted({*range(len(items))[: plan.limit]} - known.get(way, set())) for way in files}
    if not any(wanted.values()):
        return {}
    asker = ranks.on_all(lambda: _Asker(plan, items))
    if plan.overwrite:  # now that the model is there: a slip in its name costs no answers
        for file in files.values():
            ranks.on_main(file.set_aside)
    alike = {way: _alike(items, wanted[way], way) for way in files}
    ranks.on_all(lambda: _answer_share(asker, alike, files, ranks, progress))  # here each waits until all have written
    skipped = [
        (index, _reason(items[index], asker.skipped[way, first]))
        for way, first in asker.skipped
        for index in alike[way][first]
    ]
    return dict(sorted(ranks.gather(skipped)))


def _answer_share(
    asker: _Asker,
    alike: Mapping[str, Mapping[int, Sequence[int]]],
    files: Mapping[str, AnswersFile],
    ranks: Ranks,
    progress: Console | None,
) -> None:
    """Asks what is this rank's of `alike[way]`, and appends, until a rank fails."""
    for way, groups in alike.items():
        own, size = _share(asker.items, groups, ranks), asker.plan.batch_size
        batches: Iterable[Sequence[int]] = [own[start : start + size] for start in range(0, len(own), size)]
        if progress is not None and ranks.is_main:
            batches = track(batches, f"answering ({way})", console=progress, transient=True)
        for batch in batches:
            if ranks.has_failed:
                return
            answers = asker.answers(batch, way)
            for_all = {index: answer for first, answer in answers.items() for index in groups[first]}
            files[way].append(files[way].part(ranks.rank, ranks.n_ranks), for_all)


def _reason(item: Item, error: str) -> str:
    """What is said of a question that cannot be asked."""
    return f"{item.where}: question {item.id}: {error}"


def _score(
    plan: Evaluation, items: Sequence[Item], files: Mapping[str, AnswersFile], skipped: Mapping[int, str]
) -> Report:
    """The scores, written. Raises AnswersError where a question has neither an answer nor a reason to have none."""
    answers = {way: file.merge() for way, file in files.items()}
    asked = range(len(items))[: plan.limit]
    both = [index for index in asked if all(index in given for given in answers.values())]
    if lost := sorted({*asked} - {*both, *skipped}):
        raise AnswersError(
            f"{files[PICTURE].path} lacks {len(lost)} answers, the first to question {items[lost[0]].id} "
            f"({items[lost[0]].where}): something else changed it; the same command answers them"
        )
    if not both:
        raise EvaluationError(
            f"none of the {len(asked)} questions can be asked, so there is no score; the first: "
            f"{next(iter(skipped.values()))}; {_ask_for_images(plan)}"
        )
    given = {way: [found[index] for index in both] for way, found in answers.items()}
    chosen, reasons = [items[index] for index in both], list(skipped.values())
    report = report_on(plan.name, str(plan.data), plan.metric, chosen, given, reasons)
    report.write(plan.scores_path)
    return report


def _ask_for_images(plan: Evaluation) -> str:
    """Return the question whether the pictures are looked for in the right place."""
    if plan.images is None:
        return f"name the folder of the pictures (--images) if it is another one than {plan.data.parent.absolute()}"
    return f"is --images {plan.images} right? It is {Path(plan.images).absolute()}"


class _Asker:
    """The model, and what could not be asked of it."""

    def __init__(self, plan: Evaluation, items: Sequence[Item]) -> None:
        self.plan, self.items = plan, items
        self.skipped: dict[tuple[str, int], str] = {}
        """What is wrong, by way and index."""
        self.llava = LLaVA.from_pretrained(
            plan.model,
            plan.device,
            dtype=plan.dtype,
            chat_template=plan.chat_template,
            trust_remote_code=plan.trust_remote_code,
        )
        mean = self.llava.processor.image_processor.image_mean
        self._blank = Image.new("RGB", (_BLANK_SIDE, _BLANK_SIDE), tuple(int(255 * share) for share in mean))

    def answers(self, indices: Sequence[int], way: str) -> Mapping[int, Answer]:
        """Answers by index, but for questions that cannot be asked. Raises EvaluationError unless they are skipped."""
        try:
            return dict(zip(indices, self._ask([self.items[index] for index in indices], way), strict=True))
        except SampleError as error:
            if len(indices) > 1:  # whose fault it is shows when each is asked alone
                return {key: answer for index in indices for key, answer in self.answers([index], way).items()}
            if not self.plan.skip_bad:
                reason = _reason(self.items[indices[0]], str(error))
                where = f"; {_ask_for_images(self.plan)}" if error.kind == "image_missing" else ""
                raise EvaluationError(f"{reason}{where}; fix it, or leave such questions out (--skip-bad)") from error
            self.skipped[way, indices[0]] = str(error)
            return {}

    def _ask(self, items: Sequence[Item], way: str) -> list[Answer]:
        questions = [self._question(item, way) for item in items]
        if self.plan.metric == "choice":
            return [self._choose(question, item) for question, item in zip(questions, items, strict=True)]
        n_tokens = self.plan.max_new_tokens
        texts = self.llava.generate(questions, batch_size=len(questions), max_new_tokens=n_tokens)
        return [Answer(text) for text in texts]

    def _question(self, item: Item, way: str) -> Question:
        is_blank = way == BLANK
        return Question(item.turns, tuple(self._blank if is_blank else decode_image(each) for each in item.pictures))

    def _choose(self, question: Question, item: Item) -> Answer:
        sums = tuple(sum_ for sum_, _ in self.llava.log_likelihoods(question, item.options))
        return Answer(item.options[max(range(len(sums)), key=lambda number: sums[number])], sums)
