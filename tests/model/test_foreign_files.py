from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_train.errors import UserError
from llava_train.model import foreign_files
from llava_train.model.foreign_files import ForeignError, Kind, kind_of, local_path
from llava_train.model.weights import HandOffError, check_init, export_model, is_whole_model, load_init
from llava_train.use.loading import load_llava
from tests.model import originals
from tests.model.originals import assert_same, logits_of, sdpa
from tests.tiny import model_section, tiny_llava


class Code:
    """Runs when a careless reader unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1/0",)


def test_the_content_decides_whatever_the_folders_are_called(parts: tuple[Path, Path], tmp_path: Path) -> None:
    base, tower = parts
    full = originals.save_full(tmp_path / "llava-hf-lora", tower)
    lora = originals.save_lora(tmp_path / "mm_projector.bin", base, tower)
    (tmp_path / "llava-lora-full").mkdir()
    torch.save(originals.projector(), tmp_path / "llava-lora-full/mm_projector.bin")
    shutil.copy(full / "config.json", tmp_path / "llava-lora-full")
    llava = tiny_llava()
    export_model(llava.model, llava.processor, 1, tmp_path / "liuhaotian")
    shutil.copy(tmp_path / "llava-lora-full/mm_projector.bin", full)
    assert kind_of(full) is Kind.ORIGINAL
    assert kind_of(lora) is Kind.ORIGINAL_LORA
    assert kind_of(tmp_path / "llava-lora-full") is Kind.MM_PROJECTOR
    assert kind_of(full / "mm_projector.bin") is Kind.MM_PROJECTOR
    assert kind_of(tmp_path / "liuhaotian") is Kind.TRANSFORMERS
    assert is_whole_model(str(full))
    assert is_whole_model(str(lora))


def test_what_is_not_understood_is_listed_beside_what_is(parts: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ForeignError, match=r"vicuna holds config.json, .*; understood are: mm_projector.bin; an original"
    ):
        kind_of(parts[0])
    with pytest.raises(HandOffError, match="holds no finished result .*vicuna holds config.json"):
        check_init(str(parts[0]))
    with pytest.raises(ForeignError, match="holds nothing; understood are"):
        kind_of(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "some.bin")
    with pytest.raises(ForeignError, match="no mm_projector"):
        kind_of(tmp_path / "some.bin")


def test_a_relative_of_llava_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    llava = tiny_llava()
    export_model(llava.model, llava.processor, 1, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))
    with pytest.raises(ForeignError, match="holds a llava_next; of transformers' models only llava"):
        kind_of(tmp_path)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"model.mm_projector.weight": Code()}, tmp_path / "mm_projector.bin")
    for use in (check_init, lambda name: load_init(name, tiny_llava().model, model_section())):
        with pytest.raises(HandOffError, match=r"mm_projector.bin holds more than tensors .* it is not opened"):
            use(str(tmp_path))
    (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.weight": Code()}))
    with pytest.raises(HandOffError, match="holds more than tensors"):
        check_init(str(tmp_path))


def test_a_shard_with_code_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1], n_shards=2)
    torch.save({"x": Code()}, full / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ForeignError, match="00002.bin holds more than tensors"):
        load_llava(full)
    llava = tiny_llava()
    export_model(llava.model, llava.processor, 1, tmp_path / "hf")
    state = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    originals.save_tensors(state, tmp_path / "hf", n_shards=2)
    assert_same(logits_of(load_llava(tmp_path / "hf")), logits_of(sdpa(llava)))
    torch.save({"x": Code()}, tmp_path / "hf/pytorch_model-00002-of-00002.bin")
    with pytest.raises(ForeignError, match="not a LLaVA model that transformers loads"):
        load_llava(tmp_path / "hf")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    content = (tmp_path / "mm_projector.bin").read_bytes()
    (tmp_path / "mm_projector.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ForeignError, match="mm_projector.bin"):
        kind_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(ForeignError, match="model.safetensors cannot be read"):
        kind_of(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model-00002-of-00002.bin", "../elsewhere.bin"])
def test_a_shard_that_is_missing_or_elsewhere_is_named(file: str, parts: tuple[Path, Path], tmp_path: Path) -> None:
    full = originals.save_full(tmp_path / "full", parts[1], n_shards=2)
    (full / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "elsewhere.bin")
    index = full / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002-of-00002.bin", file))
    with pytest.raises(ForeignError, match=f"lacks {file}"):
        load_llava(full)


def test_what_the_hub_holds_is_told_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    monkeypatch.setattr(foreign_files, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert not is_whole_model("someone/projector")
    assert load_init("someone/projector", tiny_llava().model, model_section()) == f"projector from {tmp_path}"


def test_the_file_of_a_run_below_output_is_found(tmp_path: Path) -> None:
    torch.save(originals.projector(), tmp_path / "mm_projector.bin")
    check_init(str(tmp_path / "mm_projector.bin"), str(tmp_path))
    assert kind_of(tmp_path / "mm_projector.bin") is Kind.MM_PROJECTOR
    with pytest.raises(UserError, match="there is no run"):
        check_init(str(tmp_path / "another.bin"), str(tmp_path))


def test_of_a_repository_with_both_formats_only_safetensors_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if "pytorch_model*.bin*" in allow_patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr(foreign_files, "snapshot_download", download)
    assert local_path("someone/model") == tmp_path
    assert (tmp_path / "pytorch_model.bin").exists()
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    local_path("someone/model")
    assert len(asked) == 1 and "pytorch_model*.bin*" not in asked[0]
    assert {"mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"} <= {*asked[0]}


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "runs/a/model", "tests/nothing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ForeignError, match="there is no such folder"):
        local_path(name)
