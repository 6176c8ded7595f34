"""benchmarks/plans.py: what the recipes table of the README is made with."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from llava_train.config import RandomLanguageModel, RandomVisionTower
from llava_train.stage_file import load_stage
from tests.scripts import ROOT, load_script

plans = load_script("benchmarks/plans.py")


@pytest.mark.parametrize("path", plans.RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_the_same_but_for_parts_of_the_published_shapes(path: Path) -> None:
    recipe, planned = load_stage(path), plans.with_shapes(path)
    assert planned.model_copy(update={"model": recipe.model}) == recipe
    language_model, tower = planned.model.language_model, planned.model.vision_tower
    assert isinstance(language_model, RandomLanguageModel) and isinstance(tower, RandomVisionTower)
    assert ("13b" in str(path)) == (AutoConfig.for_model(**language_model.config).num_hidden_layers == 40)
    assert tower.config["image_size"] == (224 if "v1-7b" in str(path) else 336)


def test_the_table_says_what_does_not_fit_and_what_is_not_known() -> None:
    plan = {
        "config": "a.yaml",
        "fits": False,
        "gib": 99.0,
        "activation_checkpointing": "full",
        "steps": None,
        "hours": {},
    }
    *_, row = plans.table([plan], ["H100"], 1, "80G").splitlines()
    assert row == "| a.yaml | ? | ? | 99.0: does not fit | full |"
