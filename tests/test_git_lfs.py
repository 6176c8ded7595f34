"""Files of a model that Git LFS has not fetched are named before transformers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_train.git_lfs import is_lfs_pointer, lfs_problem_of_model
from llava_train.model.compatibility import BuildError
from llava_train.model.processor import load_tokenizer, load_vision_config
from llava_train.use.llava import LLaVA

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pointer_in_the_place_of_a_tokenizer_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(BuildError, match=f"model.language_model: .*{name} is a Git LFS pointer, .*git lfs pull"):
        load_tokenizer(str(tmp_path))


def test_a_pointer_in_the_place_of_a_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(BuildError, match="model.vision_tower: .*config.json is a Git LFS pointer"):
        load_vision_config(str(tmp_path))
    with pytest.raises(ValueError, match="Git LFS pointer"):
        LLaVA.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_the_place_of_weights_is_named_where_weights_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    assert name in str(lfs_problem_of_model(tmp_path))
    assert lfs_problem_of_model(tmp_path, ["config", "tokenizer"]) is None
    assert lfs_problem_of_model("owner/name") is None


def test_only_the_first_line_tells() -> None:
    assert is_lfs_pointer(POINTER.encode())
    assert not is_lfs_pointer(b"# version https://git-lfs.github.com/spec/v1")
