"""Invariants 1 and 9: an optimizer step is defined by its samples, and a rank needs no image.

DeepSpeed on one and two gloo ranks, packed and unpacked, against one process of plain PyTorch: transformers' own
LLaVA on one sample at a time, the sum of the cross entropies over their number, torch's AdamW and clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from llava_train.data.sources import open_source
from tests.train.equivalence_worker import (
    BATCH_SIZE,
    CASES,
    FACTORS,
    STEPS,
    WEIGHT_DECAY,
    Case,
    encoder_of,
    new_model,
)
from tests.train.helpers import run_ranks, write_samples

FP32 = [name for name, case in CASES.items() if case.precision == "fp32"]
ON_ONE_RANK = ["zero0-small-packs", "zero2-small-packs", "zero3-unpacked", "zero3-lora"]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("equivalence") / "data.json", "".join(STEPS))


def train_cases(data: Path, names: list[str], n_ranks: int) -> Results:
    out = data.with_name(f"results-{n_ranks}.pt")
    run_ranks(["-m", "tests.train.equivalence_worker", data, out, *names], data.parent, n_ranks).check()
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def on_two_ranks(data: Path) -> Results:
    return train_cases(data, list(CASES), n_ranks=2)


@pytest.fixture(scope="module")
def on_one_rank(data: Path) -> Results:
    return train_cases(data, ON_ONE_RANK, n_ranks=1)


@pytest.fixture(scope="module")
def reference(data: Path) -> Callable[[Case], dict[str, Any]]:
    """The same samples in plain PyTorch. Cases that differ in speed knobs alone share it."""

    @cache
    def shared(like: str) -> dict[str, Any]:
        return plain_pytorch(CASES[like], data)

    def find(case: Case) -> dict[str, Any]:
        same = (case.trainable, case.projector, case.clip)
        return shared(next(n for n, c in CASES.items() if (c.trainable, c.projector, c.clip) == same))

    return find


def plain_pytorch(case: Case, data: Path) -> dict[str, Any]:
    llava = new_model(case.config())
    model, encoder = llava.model, encoder_of(llava)
    model.model.language_model.set_attn_implementation("eager")
    samples = open_source(data)
    rates = {part: settings["lr"] for part, settings in case.trainable.items()}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {
            "params": [parameter],
            "lr": rates[next((part for part in ("vision_tower", "projector") if part in name), "language_model")],
            "weight_decay": WEIGHT_DECAY if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in named.items()
    ]
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    losses, norms, of_parts = [], [], []
    for step, factor in enumerate(FACTORS):
        indices = range(step * BATCH_SIZE, min((step + 1) * BATCH_SIZE, len(samples)))
        encoded = [(samples[i], encoder.encode(samples[i])) for i in indices]
        count = sum(int((tokens.labels != -100).sum()) for _, tokens in encoded)
        loss = torch.zeros(())
        for sample, tokens in encoded:
            pictures = [Image.open(str(picture)) for picture in sample.images]
            pixels = llava.processor.image_processor(pictures, return_tensors="pt").pixel_values if pictures else None
            input_ids, labels = torch.tensor(tokens.input_ids)[None], torch.tensor(tokens.labels)
            logits = model(input_ids=input_ids, pixel_values=pixels, use_cache=False).logits[0]
            loss = loss + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / count
        optimizer.zero_grad(set_to_none=False)
        if loss.requires_grad:
            loss.backward()
        for parameter in named.values():  # a part that a step does not need has the gradient zero
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        of_parts.append({part: norm_of_part(part, named) for part in case.trainable})
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), case.clip)))
        losses.append(loss.item())
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
    weights = {name: p.detach() for name, p in named.items()}
    return {"losses": losses, "norms": norms, "of_parts": of_parts, "weights": weights}


def norm_of_part(part: str, named: dict[str, torch.nn.Parameter]) -> float:
    marks = {"projector": "multi_modal_projector", "vision_tower": "vision_tower"}
    others = tuple(marks.values()) if part == "language_model" else ()
    gradients = [
        parameter.grad
        for name, parameter in named.items()
        if (not any(other in name for other in others) if others else marks[part] in name)
    ]
    return float(torch.nn.utils.get_total_norm(gradients))


def assert_same_training(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert "error" not in ours, ours["error"]
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=1e-5, abs=1e-9)
    for of_parts, expected_of_parts in zip(ours["of_parts"], expected["of_parts"], strict=True):
        assert of_parts == pytest.approx(expected_of_parts, rel=1e-5, abs=1e-9)
    assert ours["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(
            ours["weights"][name], weight, rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", FP32)
def test_training_on_two_ranks_equals_plain_pytorch(
    name: str, on_two_ranks: Results, reference: Callable[[Case], dict[str, Any]]
) -> None:
    assert_same_training(on_two_ranks[name], reference(CASES[name]))


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_training_on_one_rank_equals_plain_pytorch(
    name: str, on_one_rank: Results, reference: Callable[[Case], dict[str, Any]]
) -> None:
    assert_same_training(on_one_rank[name], reference(CASES[name]))


def test_the_cases_are_what_they_say(on_two_ranks: Results, reference: Callable[[Case], dict[str, Any]]) -> None:
    assert on_two_ranks["zero2-one-pack"]["micro_steps"] == [[1, 1, 1, 1, 1]] * 2
    assert on_two_ranks["zero2-small-packs"]["micro_steps"] == [[2, 3, 3, 2, 1]] * 2
    assert on_two_ranks["zero2-unpacked"]["micro_steps"] == [[3, 3, 3, 3, 1]] * 2
    first, second = on_two_ranks["zero2-one-pack"]["images"]
    assert first[1] + second[1] == 1, "a rank without an image, beside one with an image"
    assert first[2] == second[2] == 0, "no rank with an image"
    assert (first[4], second[4]) == (1, 0), "a rank without a sample"
    for name in ("zero2-one-pack", "zero2-projector", "zero2-linear-projector", "zero2-lora"):
        norms = reference(CASES[name])["norms"]
        assert sum(norm > CASES[name].clip for norm in norms) >= 3, "clipping is active"


def test_a_step_without_an_image_has_no_gradient_in_the_projector(on_two_ranks: Results) -> None:
    for zero in (0, 2, 3):
        norms = on_two_ranks[f"zero{zero}-projector"]["norms"]
        assert norms[2] == 0.0
        assert all(norm > 0.0 for norm in norms[:2] + norms[3:])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_steps_do_not_depend_on_the_number_of_micro_steps(zero: int, on_two_ranks: Results) -> None:
    one, several = on_two_ranks[f"zero{zero}-bf16-one-pack"], on_two_ranks[f"zero{zero}-bf16-unpacked"]
    assert several["norms"] == pytest.approx(one["norms"], rel=2e-3)
    assert several["losses"] == pytest.approx(one["losses"], rel=2e-4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_trains_like_fp32(zero: int, on_two_ranks: Results, reference: Callable[[Case], dict[str, Any]]) -> None:
    """In particular it has float32 master weights: updates here are near a bf16 weight's rounding."""
    ours, expected = on_two_ranks[f"zero{zero}-bf16-unpacked"], reference(CASES["zero0-unpacked"])
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=5e-3)
    for of_parts, norm in zip(ours["of_parts"], ours["norms"], strict=True):
        assert math.hypot(*of_parts.values()) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_micro_steps_add_up_in_float32(zero: int, on_two_ranks: Results) -> None:
    assert on_two_ranks[f"zero{zero}-bf16-unpacked"]["accumulated_in"] == "torch.float32"
