"""`mm_projector.bin`, the original LLaVA's projector, to and from transformers' names.

original, mlp2x_gelu      original, linear        here
mm_projector.0.weight     mm_projector.weight     linear_1.weight  [width, features]
mm_projector.0.bias       mm_projector.bias       linear_1.bias    [width]
mm_projector.2.weight     (an identity)           linear_2.weight  [width, width]
mm_projector.2.bias       (zeros)                 linear_2.bias    [width]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from transformers import LlavaForConditionalGeneration

from llava_train.config import ModelSection
from llava_train.model.fit import misfits, shapes_of
from llava_train.model.foreign_files import MM_PROJECTOR_FILE, ForeignError, State, read_json, read_tensors
from llava_train.model.trainable import is_linear, part_module

_MLP = {"0": "linear_1", "2": "linear_2"}
_SINGLE_LAYERS = ({"weight", "bias"}, {"0.weight", "0.bias"})
_KEY = re.compile(r"(?:.*\.)?mm_projector\.(.+)")


def save_mm_projector(model: LlavaForConditionalGeneration, file: IO[bytes]) -> None:
    """Writes the projector as the original's pretraining does, for its `--pretrain_mm_mlp_adapter`."""
    state = part_module(model, "projector").state_dict()
    names = {"linear_1": "model.mm_projector"}
    if not is_linear(model):
        names = {ours: f"model.mm_projector.{theirs}" for theirs, ours in _MLP.items()}
    torch.save(
        {
            f"{theirs}.{kind}": state[f"{ours}.{kind}"].detach().cpu().clone()
            for ours, theirs in names.items()
            for kind in ("weight", "bias")
        },
        file,
    )


def projector_from(state: Mapping[str, torch.Tensor], origin: Path) -> tuple[State, bool]:
    """The projector among tensors of the original, under transformers' names; and whether it is `linear`.

    Args:
        state: names may stand behind any prefix (`model.`, `base_model.model.model.`, `module.`).
        origin: names the tensors in errors.

    Raises:
        ForeignError: no projector, or one of another kind than `mlp2x_gelu` and `linear`.
    """
    found = {match[1]: tensor for name, tensor in state.items() if (match := _KEY.fullmatch(name))}
    if set(found) in _SINGLE_LAYERS:
        weight, bias = (found[name] for name in sorted(found, reverse=True))
        identity = torch.eye(len(bias), dtype=bias.dtype)
        return {
            "linear_1.weight": weight,
            "linear_1.bias": bias,
            "linear_2.weight": identity,
            "linear_2.bias": torch.zeros_like(bias),
        }, True
    if set(found) == {f"{layer}.{kind}" for layer in _MLP for kind in ("weight", "bias")}:
        return {f"{_MLP[name[0]]}.{name[2:]}": tensor for name, tensor in found.items()}, False
    raise ForeignError(
        f"{origin} holds a projector of {', '.join(sorted(found)) or 'no tensors'}; understood are mlp2x_gelu "
        "(0.weight, 0.bias, 2.weight, 2.bias) and linear (weight, bias)"
    )


def load_mm_projector(path: Path, model: LlavaForConditionalGeneration, section: ModelSection) -> None:
    """Loads `mm_projector.bin`, or a folder that holds it, into a model of the parts of `section`.

    Of a folder, `config.json` beside it must say of the features what the section says.

    Raises:
        ForeignError: a projector of another kind, of other features or for another width.
    """
    file = path / MM_PROJECTOR_FILE if path.is_dir() else path
    tensors = read_tensors([file])
    if extra := sorted(name for name in tensors if not _KEY.fullmatch(name)):
        raise ForeignError(f"{file} holds {extra[0]} too: tokens of its own, which are not supported")
    state, linear = projector_from(tensors, file)
    settings: dict[str, Any] = {"projector": "linear" if linear else "mlp2x_gelu"}
    if path.is_dir() and (path / "config.json").is_file():
        settings.update(feature_settings(read_json(path / "config.json")))
    check_settings(settings, section, path)
    projector = part_module(model, "projector")
    if problems := list(misfits(shapes_of(projector.state_dict()), shapes_of(state))):
        raise ForeignError(
            f"the projector in {file} does not fit: {problems[0]}; it belongs to the vision tower and language model "
            "that it was trained between: name those in the model section"
        )
    projector.load_state_dict(state)


def feature_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an original `config.json` says of the features, under the keys of the model section."""
    select = config.get("mm_vision_select_feature", "patch")
    return {
        "vision_tower": config.get("mm_vision_tower", config.get("vision_tower")),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select": "full" if select == "cls_patch" else select,
    }


def check_settings(settings: Mapping[str, Any], section: ModelSection, origin: Path) -> None:
    """Refuses what was trained on other features than the section's. Raises ForeignError."""
    for key, theirs in settings.items():
        ours = getattr(section, key)
        if key == "vision_tower":
            if not isinstance(ours, str) or theirs is None or Path(ours).name == Path(theirs).name:
                continue
        elif ours == theirs:
            continue
        raise ForeignError(
            f"{origin} was trained with {key} = {theirs!r}, this stage has {ours!r}; set model.{key} to the former "
            "(where only a name differs, the config.json there may be edited)"
        )
