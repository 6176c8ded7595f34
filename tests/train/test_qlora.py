"""Runs with 4-bit base weights: what they leave, how they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_train.model.quantize import quantize_base
from llava_train.model.trainable import part_module, set_trainable
from llava_train.stage_file import load_stage
from llava_train.train.assembly import starting_point
from llava_train.train.metrics import model_flops
from llava_train.use.export import export
from llava_train.use.loading import load_llava
from tests.train.helpers import read_lines, run_many, write_samples, write_stage

pytest.importorskip("bitsandbytes")

QLORA = {
    "projector": {"lr": 1e-2},
    "language_model": {"lr": 1e-2, "lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "quantize_base": "nf4"}},
}
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0, "precision": "bf16"},
    "zero1": {"zero": 1, "precision": "bf16"},
    "zero2": {"zero": 2, "precision": "bf16", "activation_checkpointing": "full"},
}
STARTS_FROM = {"zero0": "random", "zero1": "runs/stage1", "zero2": "runs/zero1"}
"""Parts as published, a projector, and the whole model that a run with 4-bit weights left."""
LAST = "step-00000006"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each stage on two ranks in `runs`, and in `resumed` those that went on from the checkpoint before the last."""
    folder = tmp_path_factory.mktemp("qlora")
    write_samples(folder / "data.json", "itimtttt")
    write_stage(folder / "stage1.yaml", trainable={"projector": {"lr": 1e-2}})
    for name, engine in STAGES.items():
        write_stage(
            folder / f"{name}.yaml",
            init_from=STARTS_FROM[name],
            trainable=QLORA,
            engine=engine,
            schedule={"epochs": 3, "warmup": 0.0, "weight_decay": 0.5},
            checkpoint={"every": 2, "keep": 3},
            eval={"every": 2, "data": [{"path": "data.json"}], "generate": 1, "max_new_tokens": 2},
        )
    check(run_many({name: ["--config", f"{name}.yaml"] for name in ["stage1", *STAGES]}, folder, n_ranks=2))
    for name in STAGES:
        left_out = shutil.ignore_patterns("model", "adapter", LAST, "changes.json")
        shutil.copytree(folder / "runs" / name, folder / "resumed" / name, ignore=left_out)
    resumed = {name: ["--config", f"{name}.yaml", "--set", "output=resumed"] for name in STAGES}
    check(run_many(resumed, folder, n_ranks=2))
    return folder


def check(outcomes: dict[str, Any]) -> None:
    for of_ranks in outcomes.values():
        assert all(outcome.code == 0 for outcome in of_ranks), of_ranks[0].stderr


@pytest.mark.parametrize("name", STAGES)
def test_4_bit_weights_are_unchanged_bit_for_bit_and_adapters_and_projector_are_not(name: str, folder: Path) -> None:
    changes = json.loads((folder / "runs" / name / "changes.json").read_text())
    trained = {parameter for parameter, change in changes.items() if change["trainable"]}
    assert trained == {parameter for parameter in changes if "lora_" in parameter or "projector" in parameter}
    assert {parameter for parameter, change in changes.items() if change["changed"]} == trained


@pytest.mark.parametrize("name", STAGES)
def test_resumed_beside_4_bit_weights_equals_uninterrupted(name: str, folder: Path) -> None:
    straight, resumed = folder / "runs" / name, folder / "resumed" / name
    losses = [
        [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in (straight, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (straight, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_holds_adapters_and_projector_alone(name: str, folder: Path) -> None:
    path = next((folder / "runs" / name / "checkpoints" / LAST).glob("*model_states.pt"))
    names = torch.load(path, weights_only=False)["module"].keys()
    assert names and all("lora_" in name or "multi_modal_projector" in name for name in names)


@pytest.fixture
def in_4_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The model as it was trained: 4-bit weights, and the adapter and projector beside them."""
    monkeypatch.chdir(folder)
    llava, _ = starting_point(load_stage(folder / "zero2.yaml"))
    llava.model.model.language_model.set_attn_implementation("sdpa")
    quantize_base(llava.model, torch.device("cpu"))
    adapter = folder / "runs/zero2/adapter"
    part_module(llava.model, "projector").load_state_dict(load_file(adapter / "projector.safetensors"))
    return PeftModel.from_pretrained(llava.model, str(adapter)).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, n_image_tokens: int) -> torch.Tensor:
    input_ids = torch.tensor([[5, 6, *[model.config.image_token_id] * n_image_tokens, 7, 8, 9]])
    pixel_values = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28).to(torch.bfloat16)
    return model(input_ids=input_ids, pixel_values=pixel_values).logits.float()


def test_the_result_and_the_adapter_compute_in_bf16_what_training_computed(
    in_4_bits: torch.nn.Module, folder: Path
) -> None:
    run = folder / "runs/zero2"
    plain = LlavaForConditionalGeneration.from_pretrained(run / "model")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((run / "model/config.json").read_text())
    assert AutoProcessor.from_pretrained(run / "model").chat_template
    n_image_tokens = load_llava(run).n_image_tokens
    expected = logits_of(in_4_bits, n_image_tokens)
    beside_published = PeftModel.from_pretrained(
        starting_point(load_stage(folder / "zero2.yaml"))[0].model, str(run / "adapter")
    )
    beside_published.base_model.model.model.language_model.set_attn_implementation("sdpa")
    error_of_published = (logits_of(beside_published.eval(), n_image_tokens) - expected).norm()
    for model in (plain, load_llava(run).model, load_llava(run / "adapter").model):
        assert (logits_of(model, n_image_tokens) - expected).norm() < 0.2 * error_of_published


def test_the_flops_beside_4_bit_weights_are_those_beside_whole_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config, counts = load_stage(folder / "zero2.yaml"), []
    for in_4_bits in (True, False):
        llava, _ = starting_point(config)
        if in_4_bits:
            quantize_base(llava.model, torch.device("cpu"))
        set_trainable(llava.model, config.trainable)
        counts.append(model_flops(llava.model, llava.n_image_tokens))
    assert counts[0] is not None and counts[0] == counts[1]


def test_an_export_of_the_run_finds_its_adapter_right(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    exported = export("runs/zero2", tmp_path / "out")
    assert exported.by_adapter is not None and exported.by_adapter < 0.1 * exported.largest
