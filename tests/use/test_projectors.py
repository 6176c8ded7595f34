"""`LLaVA(vision, language, projector=...)` takes whatever holds a trained projector, and nothing else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llava_train import LLaVA
from llava_train.errors import Note, UserError
from llava_train.files import write_manifest
from llava_train.model.build import build_llava
from llava_train.model.trainable import part_module
from llava_train.model.weights import save_projector
from llava_train.stage_file import parse_stage
from tests.model import originals
from tests.tiny import stage_content
from tests.use.exports import RED


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model and a vision tower, as published."""
    return originals.save_parts(tmp_path_factory.mktemp("parts"))


def joined(parts: tuple[Path, Path], projector: str | Path) -> LLaVA:
    """The parts with a projector, which nobody is warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        return LLaVA(parts[1], parts[0], "cpu", chat_template="vicuna_v1", projector=projector)


def state_of(llava: LLaVA) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in part_module(llava.model, "projector").state_dict().items()}


def write_stage1(run: Path, parts: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    """A finished run of stage 1 whose features and pictures are unlike the defaults; returns its projector."""
    model = {
        "language_model": str(parts[0]),
        "vision_tower": str(parts[1]),
        "projector": "linear",
        "vision_feature_layer": [-3, -2],
        "vision_feature_select": "full",
        "chat_template": "plain",
    }
    changes: dict[str, Any] = {"trainable": {"projector": {"lr": 1e-3}}, "init_from": None, "name": run.name}
    config = parse_stage(stage_content(run / "data.json", model=model, image={"aspect": "resize"}, **changes), "test")
    llava = build_llava(config.model, config.image, torch.float32, seed=7)
    save_projector(llava.model, config.model, run / "model")
    write_manifest(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump({**json.loads(config.model_dump_json()), "about": {}}))
    return part_module(llava.model, "projector").state_dict()


@pytest.mark.parametrize("below", ["", "model"])
def test_a_run_of_stage_1_brings_its_features_and_pictures(
    below: str, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    trained = write_stage1(tmp_path / "stage1", parts)
    llava = joined(parts, tmp_path / "stage1" / below)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in state_of(llava).items())
    config = llava.model.config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == ([-3, -2], "full")
    assert not llava.processor.image_processor.do_center_crop, "pictures are resized as in the run"
    assert isinstance(llava.generate_from_image(RED, "What?", max_new_tokens=3), str)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_projector_of_the_original_is_taken(
    linear: bool, as_folder: bool, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = originals.projector(linear=linear)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    if as_folder:
        settings = originals.settings(parts[1], mm_vision_select_layer=-1, image_aspect_ratio="square")
        (tmp_path / "config.json").write_text(json.dumps(settings))
    llava = joined(parts, tmp_path if as_folder else tmp_path / "mm_projector.bin")
    first = tensors["model.mm_projector.weight" if linear else "model.mm_projector.0.weight"]
    assert torch.equal(state_of(llava)["linear_1.weight"], first)
    assert llava.model.config.vision_feature_layer == (-1 if as_folder else -2)
    assert llava.model.config.projector_hidden_act == ("linear" if linear else "gelu")
    assert llava.processor.image_processor.do_pad != as_folder


def test_what_is_no_projector_or_of_other_parts_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1])
    write_stage1(tmp_path / "stage1", parts)
    (tmp_path / "other").symlink_to(parts[0])
    torch.save(originals.projector(width=16), tmp_path / "narrow.bin")
    (tmp_path / "train.json").write_text("[]")
    for projector, message in {
        str(full): r"projector: .*full is a whole model; load it with LLaVA.from_pretrained\('.*full'\)",
        str(tmp_path / "narrow.bin"): "projector: the projector in .*narrow.bin does not fit",
        str(tmp_path / "train.json"): "projector: .*train.json is a JSON file, no model",
        str(tmp_path / "nowhere"): "projector: .*nowhere: there is no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            joined(parts, projector)
    with pytest.raises(UserError, match="projector: the projector in .* was trained with language_model = 'vicuna'"):
        joined((tmp_path / "other", parts[1]), tmp_path / "stage1")
