"""Invariant 4: a stage leaves every frozen parameter bit for bit as it was, and changes what trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.train.helpers import run_many, write_samples, write_stage

PROJECTOR, LANGUAGE_MODEL = {"projector": {"lr": 1e-2}}, {"language_model": {"lr": 1e-2}}
LORA = {"language_model": {"lr": 1e-2, "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}}}
STAGES: dict[str, dict[str, Any]] = {
    "stage1-zero2": {"trainable": PROJECTOR, "engine": {"zero": 2, "precision": "fp32"}},
    "stage1-zero0-bf16": {"trainable": PROJECTOR, "engine": {"zero": 0, "precision": "bf16"}},
    "linear-zero3": {"trainable": PROJECTOR, "engine": {"zero": 3, "precision": "fp32"}},
    "lora-zero2": {"trainable": {**PROJECTOR, **LORA}, "engine": {"zero": 2, "precision": "fp32"}},
    "lora-zero3": {"trainable": LORA, "engine": {"zero": 3, "precision": "bf16", "activation_checkpointing": True}},
    "full-zero1": {"trainable": {**PROJECTOR, **LANGUAGE_MODEL}, "engine": {"zero": 1, "precision": "bf16"}},
    "tower-zero2": {"trainable": {"vision_tower": {"lr": 1e-2}}, "engine": {"zero": 2, "precision": "fp32"}},
}
TRAINS: dict[str, Callable[[str], bool]] = {
    "stage1-zero2": lambda name: "multi_modal_projector" in name,
    "stage1-zero0-bf16": lambda name: "multi_modal_projector" in name,
    "linear-zero3": lambda name: "multi_modal_projector.linear_1" in name,
    "lora-zero2": lambda name: "multi_modal_projector" in name or "lora_" in name,
    "lora-zero3": lambda name: "lora_" in name,
    "full-zero1": lambda name: "vision_tower" not in name,
    "tower-zero2": lambda name: (
        # vision_feature_layer -2 of three layers, patches only: the last layer and norm are not used
        "vision_tower" in name and "layers.2." not in name and "post_layernorm" not in name
    ),
}

Changes = dict[str, dict[str, bool]]


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Changes]:
    """What became of each parameter of the engine in whole runs with weight decay, evaluation and checkpoints."""
    folder = tmp_path_factory.mktemp("frozen")
    write_samples(folder / "data.json", "itimtttt")
    for name, stage in STAGES.items():
        path = write_stage(
            folder / f"{name}.yaml",
            **stage,
            schedule={"epochs": 2, "warmup": 0.0, "weight_decay": 0.5},
            checkpoint={"every": 2},
            eval={"every": 2, "data": [{"path": "data.json"}], "generate": 1, "max_new_tokens": 2},
        )
        if name.startswith("linear"):
            path.write_text(path.read_text().replace("model:\n", "model:\n  projector: linear\n", 1))
    outcomes = run_many({name: ["--config", f"{name}.yaml"] for name in STAGES}, folder, n_ranks=2)
    for name, (outcome, _) in outcomes.items():
        assert outcome.code == 0, name + outcome.stderr
    return {name: json.loads((folder / "runs" / name / "changes.json").read_text()) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_frozen_parameters_are_unchanged_and_trained_ones_are_not(name: str, changes: dict[str, Changes]) -> None:
    trained = {parameter for parameter, change in changes[name].items() if change["trainable"]}
    changed = {parameter for parameter, change in changes[name].items() if change["changed"]}
    assert trained == {parameter for parameter in changes[name] if TRAINS[name](parameter)}
    assert changed - trained == set()
    assert trained - changed == set()
