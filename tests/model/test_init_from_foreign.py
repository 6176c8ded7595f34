from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.model.build import Llava
from llava_train.model.weights import HandOffError, check_init, load_init
from llava_train.use.loading import load_llava
from tests.model import originals
from tests.model.originals import assert_same, expected_logits, logits_of, merged_by_hand, sdpa
from tests.tiny import tiny_llava


def stage_model(parts: tuple[Path, Path], folder: Path, **changes: Any) -> Llava:
    section = originals.section_of(*parts, **changes)
    llava = tiny_llava(section)
    row = llava.model.get_input_embeddings().weight[originals.N_TOKENS].clone()
    check_init(str(folder))
    assert load_init(str(folder), llava.model, section) == f"whole model from {folder}"
    assert torch.equal(llava.model.get_input_embeddings().weight[originals.N_TOKENS], row)
    return sdpa(llava)


def test_a_full_checkpoint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = originals.language_model(seed=7)
    full = originals.save_full(tmp_path / "full", parts[1], {**originals.projector(), **tuned.state_dict()})
    assert_same(logits_of(stage_model(parts, full)), expected_logits(originals.projector(), tuned))


def test_a_full_checkpoint_whose_tower_was_trained(parts: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = originals.vision_tower(seed=9)
    extra = {**originals.projector(), **originals.tower_state(tuned)}
    full = originals.save_full(tmp_path / "full", Path("gone/elsewhere"), extra)
    assert_same(logits_of(stage_model(parts, full)), expected_logits(originals.projector(), tower=tuned))


def test_lora(parts: tuple[Path, Path], tmp_path: Path) -> None:
    lora = originals.save_lora(tmp_path / "x", *parts)
    expected = expected_logits(originals.projector(seed=5), merged_by_hand(3.0))
    assert_same(logits_of(stage_model(parts, lora)), expected)


def test_a_model_of_transformers(parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1])
    llava = load_llava(full)
    llava.model.save_pretrained(tmp_path / "hf")
    assert_same(logits_of(stage_model(parts, tmp_path / "hf")), expected_logits(originals.projector()))


@pytest.mark.parametrize("n_added", [-1, 1, 40])
def test_added_rows_of_the_vocabulary_may_differ(n_added: int, parts: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = originals.language_model(seed=7)
    tuned.resize_token_embeddings(originals.N_TOKENS + n_added, mean_resizing=False)
    extra = {**originals.projector(), **tuned.state_dict()}
    full = originals.save_full(tmp_path / "full", parts[1], extra, vocab_size=originals.N_TOKENS + n_added)
    if n_added < 0:
        section = originals.section_of(*parts)
        with pytest.raises(
            HandOffError, match=r"language_model: .*embed_tokens.weight is \[261, 32\] there and \[320, 32\] here"
        ):
            load_init(str(full), tiny_llava(section).model, section)
    else:
        found = logits_of(stage_model(parts, full))
        assert_same(found, expected_logits(originals.projector(), tuned)[..., : originals.N_TOKENS])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projector": "linear"},
            "trained with projector = 'mlp2x_gelu', this stage has 'linear'; set model.projector",
        ),
        ({"vision_feature_layer": -1}, "vision_feature_layer = -2, this stage has -1"),
    ],
)
def test_other_features_are_refused(changes: dict, message: str, parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1])
    load_llava(full).model.save_pretrained(tmp_path / "hf")
    section = originals.section_of(*parts, **changes)
    for folder in (full, tmp_path / "hf"):
        with pytest.raises(HandOffError, match=message):
            load_init(str(folder), tiny_llava(section).model, section)


def test_another_tower_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", Path("openai/clip-vit-large-patch14-336"))
    section = originals.section_of(*parts)
    with pytest.raises(
        HandOffError, match="vision_tower = 'openai/clip-vit-large-patch14-336', this stage has .*clip-tiny"
    ):
        load_init(str(full), tiny_llava(section).model, section)
