"""Weights that others wrote: which kind a folder holds, told from its content, and its tensors, read as data alone.

`.bin` files are pickles, which can run code when they are read: they are opened with `weights_only`, and one that
holds anything but tensors is refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llava_train.errors import UserError
from llava_train.failures import reason
from llava_train.file_kinds import kind_of_file
from llava_train.files import is_hub_id
from llava_train.git_lfs import lfs_problem_of_model
from llava_train.model.not_a_model import not_a_model, what_to_name

State = dict[str, torch.Tensor]

MM_PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER = "adapter"
"""Beside a model of ours with LoRA."""

_SMALL_BINS = (MM_PROJECTOR_FILE, NON_LORA_FILE, "adapter_model.bin")
_FROM_THE_HUB = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", *_SMALL_BINS)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OF_WEIGHTS = ("a file of PyTorch", "a pickle", "a safetensors file")
_DAMAGED = ("a damaged ZIP archive", "an empty file", "a file of blanks")
"""Kinds of files that may have held tensors: what reads tensors says what is wrong."""
_UNDERSTOOD = (
    f"{MM_PROJECTOR_FILE}; an original LLaVA checkpoint (config.json, weights with model.mm_projector.*); its LoRA "
    f"form ({ADAPTER_CONFIG}, adapter_model, {NON_LORA_FILE}); a LLaVA model of transformers (config.json, weights "
    "with multi_modal_projector.*)"
)


class ForeignError(UserError):
    """Weights that cannot be used. The message names the file and the mend."""


class NothingUnderstood(ForeignError):
    """A file or folder that holds none of the kinds below."""


class Kind(Enum):
    """What foreign weights are."""

    MM_PROJECTOR = "a projector of the original LLaVA"
    ORIGINAL = "an original LLaVA checkpoint"
    ORIGINAL_LORA = "an original LLaVA checkpoint with LoRA"
    TRANSFORMERS = "a LLaVA model of transformers"


def local_path(name: str | Path) -> Path:
    """The file or folder itself, or a copy of a repository of the hub. Raises ForeignError."""
    if Path(name).exists():
        return Path(name)
    if not is_hub_id(name):
        parent = Path(name).parent
        there = [path.name for path in sorted(parent.glob("[!.]*"))[:8] if path.is_dir()]
        has = f" ({parent} has: {', '.join(there)})" if there else ""
        raise ForeignError(f"{name}: there is no such folder{has}; name a run, a model, or a hub id (owner/name)")
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=list(_FROM_THE_HUB)))
        if not any(folder.glob("*.safetensors")):  # where there are both, the other format would double the download
            folder = Path(snapshot_download(str(name), allow_patterns=[*_FROM_THE_HUB, "pytorch_model*.bin*"]))
        return folder
    except (OSError, ValueError) as error:
        raise ForeignError(f"{name}: {reason(error, name)}") from error


def kind_of(path: Path) -> Kind:
    """What a file or folder holds, by the names of its tensors; its own name means nothing.

    Raises:
        ForeignError: nothing that is understood; the message says what was found.
    """
    for place in (path, path / ADAPTER_FOLDER):
        if problem := lfs_problem_of_model(place):
            raise ForeignError(problem)
    if path.is_file():
        if any("mm_projector." in name for name in tensor_names([path])):
            return Kind.MM_PROJECTOR
        raise NothingUnderstood(f"{path} holds no mm_projector.* tensors; understood are: {_UNDERSTOOD}")
    if (path / ADAPTER_CONFIG).is_file() and (path / NON_LORA_FILE).is_file():
        return Kind.ORIGINAL_LORA
    if has_projector(path):
        return Kind.ORIGINAL
    if any("multi_modal_projector." in name for name in _names_in(path)):
        model_type = read_json(path / "config.json").get("model_type")
        if model_type != "llava":
            raise ForeignError(f"{path} holds a {model_type}; of transformers' models only llava is understood")
        return Kind.TRANSFORMERS
    if (path / MM_PROJECTOR_FILE).is_file():
        return kind_of(path / MM_PROJECTOR_FILE)
    raise NothingUnderstood(not_a_model(path, _UNDERSTOOD))


def has_projector(folder: Path) -> bool:
    """Whether a model's weights are those of an original LLaVA, not of a language model alone."""
    return any("mm_projector." in name for name in _names_in(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, one or many; safetensors where there are both, none where there are none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            files = sorted(set(_weight_map(index).values()))
            if missing := [file for file in files if Path(file).name != file or not (folder / file).is_file()]:
                raise ForeignError(f"{folder} lacks {missing[0]}, which {index.name} names; copy the folder again")
            return [folder / file for file in files]
    return []


def tensor_names(files: list[Path]) -> set[str]:
    """Names of the tensors in files, without reading them where the format allows it. Raises ForeignError."""
    names: set[str] = set()
    for file in files:
        _refuse_no_weights(file)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    names.update(opened.keys())
            except SafetensorError as error:
                raise ForeignError(f"{file} cannot be read: {error}") from error
        else:
            names.update(read_tensors([file]))
    return names


def _refuse_no_weights(file: Path) -> None:
    """Refuses a file that is plainly something else, before PyTorch takes it for a dangerous pickle."""
    try:
        kind = kind_of_file(file)
    except OSError as error:
        raise ForeignError(f"{file} cannot be read: {error.strerror}") from error
    if kind is not None and kind.words not in (*_OF_WEIGHTS, *_DAMAGED):
        raise ForeignError(f"{file} is {kind.words}, no model; {what_to_name(file, kind)}")


def read_tensors(files: list[Path]) -> State:
    """The tensors of `.safetensors` and `.bin` files, on the CPU, mapped into memory where the format allows it.

    Raises:
        ForeignError: a damaged file, or a pickle that holds more than tensors.
    """
    state: State = {}
    for file in files:
        _refuse_no_weights(file)
        try:
            if file.suffix == ".safetensors":
                content: Any = load_file(file)
            else:
                content = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))  # else PyTorch's advice to load it anyway
            raise ForeignError(
                f"{file} holds more than tensors{f' ({found[1]})' if found else ''}, which could run code when it is "
                "read: it is not opened; save its tensors as .safetensors where you trust it"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise ForeignError(f"{file} cannot be read: {error}; copy it again") from error
        if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise ForeignError(f"{file} holds no table of tensors")
        state.update(content)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ForeignError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ForeignError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ForeignError(f"{path} is not a JSON object")
    return content


def _names_in(folder: Path) -> set[str]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if not (folder / name).is_file() and index.is_file():
            return set(_weight_map(index))
    return tensor_names(weight_files(folder))


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ForeignError(f"{index} names no tensors (weight_map)")
    return content
