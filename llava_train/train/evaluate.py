"""Held-out loss, generated answers and what they are worth, while training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from transformers import LlavaForConditionalGeneration

from llava_train.config import EvalSection, StageConfig
from llava_train.data.images import decode_image
from llava_train.data.loader import StepDataset
from llava_train.data.pictures import Picture
from llava_train.data.problems import SampleError
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.model.attention import PACKED
from llava_train.model.build import Llava
from llava_train.model.kernels import uncompiled
from llava_train.train.loop import BadSampleError, forward, refuse_bad
from llava_train.train.shown_pictures import save_pictures
from llava_train.train.tracking import Evaluated
from llava_train.train.world import World
from llava_train.use.generation import Prompt, Sampling, answers_of
from llava_train.use.metrics import Metric, Score, judge, scores_of
from llava_train.use.prompts import Prompts
from llava_train.use.questions import Item, first_question, read_questions

_BATCH = 8
"""Questions that a rank answers together."""
_N_LOOKED_AT = 200
"""Samples among which different questions are looked for."""


@dataclass(frozen=True)
class HeldOut:
    """What a run is evaluated on: a data set in its own order, and questions to answer."""

    dataset: StepDataset
    shown: tuple[Item, ...]
    """Their answers are kept, to be read."""
    measured: tuple[Item, ...]
    """The score is over their answers."""
    pictures: Sequence[list[str]]
    """Of each shown question, files in the run's folder."""


def open_held_out(world: World, dataset: StepDataset, section: EvalSection, run_dir: Path) -> HeldOut:
    """The questions of the data set to show and to measure, and those of `eval.questions`. Every rank must call it.

    The first readable ones are measured. Those that are shown differ in question and picture, where they can; their
    pictures are saved in the run's folder.

    Raises:
        DataError, QuestionError: the questions cannot be read, or lack what the metric measures by.
    """
    of_data = section.metric is not None and section.questions is None
    n_measured = section.metric_samples if of_data else 0
    indices = world.on_main(lambda: _readable(dataset, n_measured))
    metric = section.metric if of_data else None
    items = {index: _question(dataset, index, metric) for index in indices}
    measured = tuple(items.values())
    indices = world.on_main(lambda: _different(dataset, section.generate))
    shown = tuple(items.get(index) or _question(dataset, index, None) for index in indices)
    if section.metric and section.questions:
        measured = tuple(read_questions(Path(section.questions.path), section.metric, section.questions.images))
    pictures = world.on_main(lambda: save_pictures(shown, run_dir))
    return HeldOut(dataset, shown, measured[: section.metric_samples], pictures)


def _question(dataset: StepDataset, index: int, metric: Metric | None) -> Item:
    """Return the first question of a sample. Raises QuestionError where the metric cannot measure its answer."""
    return first_question(dataset.mixture[index], f"eval.data, sample {index}", metric)


def _different(dataset: StepDataset, n: int) -> list[int]:
    """Return `n` readable samples that ask other questions about other pictures, as far as there are such."""
    items: dict[int, Item] = {}
    for index in range(min(_N_LOOKED_AT, len(dataset.mixture)) if n else 0):
        with suppress(SampleError):
            items[index] = _question(dataset, index, None)
    chosen: dict[int, Item] = {}
    for n_new in (2, 1, 0):  # of question and picture
        for index, item in items.items():
            if len(chosen) == n:
                break
            questions = {each.prompt for each in chosen.values()}
            pictures = {each.group for each in chosen.values()}
            is_new = (item.prompt not in questions) + (item.group not in pictures) >= n_new
            if is_new and index not in chosen and _is_readable(item.pictures):
                chosen[index] = item
    return sorted(chosen)


def _is_readable(pictures: Iterable[Picture]) -> bool:
    try:
        for picture in pictures:
            decode_image(picture)
    except SampleError:
        return False
    return True


def _readable(dataset: StepDataset, n: int) -> list[int]:
    """The first `n` samples whose pictures can be decoded."""
    found: list[int] = []
    for index in range(len(dataset.mixture)):
        if len(found) == n:
            break
        with suppress(SampleError):
            if _is_readable(dataset.mixture[index].images):
                found.append(index)
    return found


def evaluate(
    engine: deepspeed.DeepSpeedEngine, world: World, llava: Llava, held_out: HeldOut, config: StageConfig
) -> Evaluated:
    """Held-out loss, generated answers and their score. Every rank must call it.

    Raises:
        BadSampleError: a sample cannot be read, as the stage file says, or none can.
    """
    section = config.eval
    assert section is not None
    loss, n_bad = held_out_loss(engine, world, held_out.dataset, config)
    items = list({id(item): item for item in (*held_out.shown, *held_out.measured)}.values())
    texts = answers_to(items, engine, world, llava, held_out.dataset, config)
    answers = {id(item): text for item, text in zip(items, texts, strict=True) if text is not None}
    kept = tuple(
        {
            "id": item.id,
            "prompt": item.turns[-1].text,
            "answer": answers[id(item)],
            "expected": item.references[0],
            "pictures": pictures,
        }
        for item, pictures in zip(held_out.shown, held_out.pictures, strict=True)
        if id(item) in answers
    )
    measured = [item for item in held_out.measured if id(item) in answers]
    if held_out.measured and not measured:
        first = held_out.measured[0]
        raise BadSampleError(
            f"eval.metric: none of its {len(held_out.measured)} questions can be asked, the first is {first.id} "
            f"({first.where}): their pictures cannot be read, or their texts cannot be encoded"
        )
    return Evaluated(loss, n_bad, kept, _scores(section, measured, [answers[id(item)] for item in measured]))


def _scores(section: EvalSection, items: Sequence[Item], answers: Sequence[str]) -> dict[str, Score]:
    """The metric's first score under its own name, further ones after it: `pope`, `pope_precision`."""
    if section.metric is None or not items:
        return {}
    parts = judge(section.metric, answers, [item.references for item in items])
    first, *others = scores_of(parts, [item.group for item in items])
    return {section.metric: first, **{f"{section.metric}_{score.name}": score for score in others}}


@torch.no_grad()
def held_out_loss(
    engine: deepspeed.DeepSpeedEngine, world: World, dataset: StepDataset, config: StageConfig
) -> tuple[float, int]:
    """Mean cross entropy over the supervised tokens of the first `eval.max_samples` samples, and how many are left out.

    Over all ranks.
    """
    assert config.eval is not None
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    n_steps = -(-min(config.eval.max_samples, len(dataset.mixture)) // dataset.batch_size)
    with evaluating(engine):
        for step in range(n_steps):
            world.beat(f"held-out loss, batch {step + 1} of {n_steps}")
            batch = dataset[step]
            refuse_bad(batch, config)
            totals[2] += sum(world.is_main or not bad.on_every_rank for bad in batch.bad_samples)
            for micro_batch in batch.micro_batches:
                totals[0] += forward(engine, micro_batch.to(world.device))[1].sum().double()
                totals[1] += micro_batch.n_supervised
    torch.distributed.all_reduce(totals)
    loss_sum, n_supervised, n_bad = totals.tolist()
    if not n_supervised:
        why = "can be read" if n_bad else "has a supervised token"
        raise BadSampleError(f"eval.data: none of its samples {why}; `llava-train check` says more")
    return loss_sum / n_supervised, int(n_bad)


@torch.no_grad()
def answers_to(
    items: Sequence[Item],
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    llava: Llava,
    dataset: StepDataset,
    config: StageConfig,
) -> list[str | None]:
    """Greedy answers, on every rank; None to what cannot be asked. Each rank answers a share, in batches.

    Under ZeRO 3 every rank needs the others' parameters: all run the same batches and tokens, and each batch ends with
    a blank picture, so that no rank passes over the vision tower.
    """
    assert config.eval is not None
    known, found, sampling = Prompts(llava), dict[int, str](), Sampling(max_new_tokens=config.eval.max_new_tokens)
    in_step = config.engine.zero == 3 and world.n_ranks > 1
    padding = [_blank_prompt(known, dataset)] if in_step else []
    own, n_batches = range(len(items))[world.rank :: world.n_ranks], -(-len(items) // (_BATCH * world.n_ranks))
    with evaluating(engine), generating(llava.model):
        for number in range(n_batches):
            world.beat(f"generating answers, batch {number + 1} of {n_batches}")
            prompts = {}
            for index in own[number * _BATCH : (number + 1) * _BATCH]:
                with suppress(SampleError):
                    prompts[index] = _prompt(items[index], known, dataset)
            if asked := [*prompts.values(), *padding]:
                texts = answers_of(llava, known, asked, sampling, synced_gpus=in_step)
                found.update(zip(prompts, texts, strict=False))  # without the blank one's
    for share in world.gather(found):
        found.update(share)
    return [found.get(index) for index in range(len(items))]


def _prompt(item: Item, known: Prompts, dataset: StepDataset) -> Prompt:
    """Raises SampleError."""
    pixels = [dataset.preprocessor(decode_image(picture)) for picture in item.pictures]
    return Prompt(known.encode(item.turns, len(pixels)), torch.stack(pixels) if pixels else None)


def _blank_prompt(known: Prompts, dataset: StepDataset) -> Prompt:
    return Prompt(known.encode((Turn("user", IMAGE_PLACEHOLDER),), 1), dataset.preprocessor.blank()[None])


@contextmanager
def evaluating(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = {module: module.training for module in engine.module.modules()}
    engine.module.eval()
    try:
        with uncompiled(engine.module):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def generating(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Attention with a key-value cache in place of attention over packs."""
    language_model = model.model.language_model
    language_model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        language_model.set_attn_implementation(PACKED)
