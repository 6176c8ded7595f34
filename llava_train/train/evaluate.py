"""Held-out loss and a few generated answers while training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from transformers import LlavaForConditionalGeneration

from llava_train.config import StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.images import decode_image
from llava_train.data.loader import StepDataset
from llava_train.data.problems import SampleError
from llava_train.data.samples import Turn
from llava_train.model.attention import PACKED
from llava_train.model.build import Llava
from llava_train.train.loop import BadSampleError, forward, refuse_bad
from llava_train.train.world import World


def evaluate(
    engine: deepspeed.DeepSpeedEngine, world: World, llava: Llava, dataset: StepDataset, config: StageConfig
) -> tuple[float, int, list[dict[str, str]]]:
    """Held-out loss, samples that it leaves out, and generated answers, on a data set in its own order.

    Every rank must call it.

    Raises:
        BadSampleError: a sample cannot be read, as the stage file says, or none can.
    """
    section = config.eval
    assert section is not None
    loss, n_bad = held_out_loss(engine, world, dataset, config)
    return loss, n_bad, answers(engine, world, llava, dataset, section.generate, section.max_new_tokens)


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
                totals[0] += forward(engine, micro_batch.to(world.device)).sum().double()
                totals[1] += micro_batch.n_supervised
    torch.distributed.all_reduce(totals)
    loss_sum, n_supervised, n_bad = totals.tolist()
    if not n_supervised:
        raise BadSampleError("eval.data: none of its samples can be read; `llava-train check` says why")
    return loss_sum / n_supervised, int(n_bad)


@torch.no_grad()
def answers(
    engine: deepspeed.DeepSpeedEngine,
    world: World,
    llava: Llava,
    dataset: StepDataset,
    n_answers: int,
    max_new_tokens: int,
) -> list[dict[str, str]]:
    """Greedy answers to the first question of the first readable samples.

    Every rank must call it and computes the same: under ZeRO 3 each needs the others' parameters.
    """
    found: list[dict[str, str]] = []
    with evaluating(engine), generating(llava.model):
        for index in range(len(dataset.mixture)):
            if len(found) == n_answers:
                break
            world.beat("generating answers")
            try:
                sample = dataset.mixture[index]
                images = [decode_image(picture) for picture in sample.images]
            except SampleError:
                continue
            question = _until_first_answer(sample.turns)
            n_images = sum(turn.text.count("<image>") for turn in question)
            text, _ = dataset.encoder.render(question, prompt=True)
            answer = generate(llava, text, images[:n_images], max_new_tokens, dataset.encoder)
            expected = sample.turns[len(question)].text
            found.append({"id": sample.id, "prompt": question[-1].text, "answer": answer, "expected": expected})
    return found


def generate(llava: Llava, text: str, images: Sequence[Any], max_new_tokens: int, encoder: ChatEncoder) -> str:
    """The greedy answer to a rendered prompt."""
    stop = encoder.stop_string()
    inputs = llava.processor(text=text, images=list(images) or None, add_special_tokens=False, return_tensors="pt").to(
        llava.model.device
    )
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(llava.model.dtype)
    output = llava.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=encoder.end_of_turn_id(),
        stop_strings=stop,
        tokenizer=llava.tokenizer,
        pad_token_id=llava.tokenizer.pad_token_id,
    )
    answer = str(llava.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return (answer.partition(stop)[0] if stop else answer).strip()


@contextmanager
def evaluating(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = {module: module.training for module in engine.module.modules()}
    engine.module.eval()
    try:
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


def _until_first_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return turns[: next(i for i, turn in enumerate(turns) if turn.role == "assistant")]
