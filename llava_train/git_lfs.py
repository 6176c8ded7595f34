"""Recognises Git LFS pointers: what a clone without Git LFS has in place of a large file.

A pointer is a small text file whose first line names the format, `version https://git-lfs.github.com/spec/v1`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

LFS_ADVICE = (
    "which stands for a file that was not fetched: run `git lfs install` and `git lfs pull` in the clone that it is "
    "from, or download the file itself (`hf download`)"
)

_FIRST_LINE = re.compile(rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
_READ_OF_A_MODEL = {
    "config": (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "adapter_config.json",
        "projector.json",
    ),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template.*",
    ),
    "weights": ("*.index.json", "model*.safetensors", "adapter_model.safetensors", "projector.safetensors"),
}
"""Files of a model's folder that are read, by part."""
_OLD_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin", "non_lora_trainables.bin")
"""Read of a folder without safetensors."""
_SLOW_TOKENIZERS = ("*.model",)
"""Read of a folder without tokenizer.json."""


def is_lfs_pointer(head: bytes) -> bool:
    """True if a file that begins so is what a clone without Git LFS has in place of a large file."""
    return _FIRST_LINE.match(head) is not None


def lfs_problem(path: Path) -> str | None:
    """Says that a file is a Git LFS pointer and what to do; None for any other file."""
    try:
        with path.open("rb") as file:
            is_pointer = is_lfs_pointer(file.read(64))
    except OSError:
        return None
    return f"{path} is a Git LFS pointer, {LFS_ADVICE}" if is_pointer else None


def lfs_problem_of_model(folder: str | Path, parts: Collection[str] = ("config", "tokenizer", "weights")) -> str | None:
    """Says which file of a model's folder, of those that are read, is a Git LFS pointer; None where all are there.

    Args:
        folder: may be a file of weights; a hub id has no problem.
        parts: what is read: of `config`, `tokenizer` and `weights`.
    """
    folder = Path(folder)
    if folder.is_file():
        return lfs_problem(folder)
    names = [name for part in parts for name in _READ_OF_A_MODEL[part]]
    if "weights" in parts and not any(folder.glob("*.safetensors")):
        names += _OLD_WEIGHTS
    if "tokenizer" in parts and not (folder / "tokenizer.json").is_file():
        names += _SLOW_TOKENIZERS
    found = sorted(path for name in names for path in folder.glob(name))
    return next((problem for path in found if (problem := lfs_problem(path))), None)
