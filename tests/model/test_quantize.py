"""4-bit base weights, made and used by bitsandbytes for real; its CPU kernels compute what its CUDA kernels do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llava_train.config import RandomLanguageModel, TrainableSection
from llava_train.data.loader import PackedBatch
from llava_train.model.build import Llava
from llava_train.model.quantize import QuantizeError, check_quantization, quantize_base, round_like_nf4
from llava_train.model.trainable import part_of, set_trainable, summarize
from tests.model.test_loss import loss_of
from tests.tiny import LANGUAGE_MODEL, dataset_of, model_section, tiny_llava, write_data

LORA = {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4}}
QLORA = {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4, "quantize_base": "nf4"}}
SECTION = TrainableSection(projector={"lr": 1e-3}, language_model=QLORA)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def a_llava() -> Llava:
    """A block of NF4 has 64 weights: a tiny model whose layers have as many inputs."""
    config = {**LANGUAGE_MODEL, "hidden_size": 64, "intermediate_size": 128}
    return tiny_llava(model_section(language_model=RandomLanguageModel(config=config)), torch.bfloat16)


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")


def twins(device: str) -> tuple[Llava, Llava]:
    """A model with 4-bit weights, and one with the values that they stand for in bf16; both with adapters."""
    quantized, rounded = a_llava(), a_llava()
    quantize_base(quantized.model, torch.device(device))
    round_like_nf4(rounded.model)
    for llava in (quantized, rounded):
        set_trainable(llava.model, SECTION)
        llava.model.to(device)  # DeepSpeed does
    return quantized, rounded


def a_pack(llava: Llava, folder: Path, device: str) -> PackedBatch:
    return (
        dataset_of(llava, write_data(folder, 4), seed=None, batch_size=4)[0].micro_batches[0].to(torch.device(device))
    )


@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_beside_4_bit_weights_are_those_beside_the_values_they_stand_for(
    device: str, bitsandbytes: None, tmp_path: Path
) -> None:
    found = []
    for llava in twins(device):
        loss = loss_of(llava, a_pack(llava, tmp_path, device))
        loss.backward()
        found.append((loss, {name: p.grad for name, p in llava.model.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    assert gradients.keys() == expected.keys() and any("lora_B" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-2, atol=1e-3, msg=name)
    assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if "projector" in name)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_in_between_changes_neither_4_bit_weights_nor_the_loss(
    device: str, bitsandbytes: None, tmp_path: Path
) -> None:
    quantized, _ = twins(device)
    pack = a_pack(quantized, tmp_path, device)
    before = {name: p.detach().clone() for name, p in quantized.model.named_parameters()}
    loss = loss_of(quantized, pack)
    with torch.no_grad():
        quantized.model.eval()
        in_evaluation = loss_of(quantized, pack)
    quantized.model.train()
    assert torch.equal(loss_of(quantized, pack), loss) and torch.equal(in_evaluation, loss)
    assert all(torch.equal(p, before[name]) for name, p in quantized.model.named_parameters())


def test_the_linear_layers_of_the_language_model_alone_are_in_4_bits(bitsandbytes: None) -> None:
    llava = a_llava()
    whole = llava.model.get_memory_footprint()
    quantize_base(llava.model, torch.device("cpu"))
    in_4_bits = {name for name, p in llava.model.named_parameters() if p.dtype == torch.uint8}
    assert len(in_4_bits) == 2 * 7
    assert all(".layers." in name and part_of(name) == "language_model" for name in in_4_bits)
    others = [p for name, p in llava.model.named_parameters() if name not in in_4_bits]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert llava.model.get_memory_footprint() < whole


def test_a_summary_counts_weights_and_not_bytes(bitsandbytes: None) -> None:
    counts = []
    for section in (SECTION, TrainableSection(projector={"lr": 1e-3}, language_model=LORA)):
        model = a_llava().model
        if section is SECTION:
            quantize_base(model, torch.device("cpu"))
        set_trainable(model, section)
        counts.append([(part.n_parameters, part.n_trainable) for part in summarize(model, section)])
    assert counts[0] == counts[1]


def test_a_state_dict_holds_nothing_of_a_layer_in_4_bits_but_its_frozen_weight(bitsandbytes: None) -> None:
    quantized, rounded = twins("cpu")
    assert quantized.model.state_dict().keys() == rounded.model.state_dict().keys()


@pytest.mark.parametrize("hidden_size", [32, 64])
def test_rounded_weights_are_near_the_published_ones(hidden_size: int, bitsandbytes: None) -> None:
    config = {**LANGUAGE_MODEL, "hidden_size": hidden_size}
    model = tiny_llava(model_section(language_model=RandomLanguageModel(config=config)), torch.bfloat16).model
    published = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    published = {name: tensor.clone() for name, tensor in published.items()}
    round_like_nf4(model)
    errors = {
        name: ((parameter.detach().float() - published[name]).norm() / published[name].norm()).item()
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.float(), published[name])
    }
    assert len(errors) == 2 * 7
    assert all(0.05 < error < 0.15 for error in errors.values()), "NF4 rounds normal weights by 9%"


def test_a_layer_that_bitsandbytes_misreads_on_a_cpu_is_refused(bitsandbytes: None) -> None:
    with pytest.raises(QuantizeError, match="q_proj has 32 inputs; on a CPU .* no multiple of 64; use a GPU, or rem"):
        quantize_base(tiny_llava(dtype=torch.bfloat16).model, torch.device("cpu"))


def test_4_bit_weights_without_bitsandbytes_are_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        QuantizeError, match="lora.quantize_base: 4-bit weights need bitsandbytes; pip install .llava_train.qlora"
    ):
        check_quantization(SECTION)
    check_quantization(TrainableSection(language_model=LORA))
