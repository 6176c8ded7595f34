"""What is no model is refused by what it is, wherever a model is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_train.errors import UserError
from llava_train.model.foreign_files import ForeignError, kind_of
from llava_train.model.weights import HandOffError, check_init
from llava_train.use.loading import load_llava
from tests.scripts import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of things that are no model."""
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "conversations": []}]))
    (tmp_path / "train.csv").write_text("id,image\n1,a.png\n2,b.png\n")
    (tmp_path / "page.bin").write_text("<html>404</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    shutil.copy(ROOT / "configs/smoke/stage2.yaml", tmp_path / "stage2.yaml")
    (tmp_path / "img").mkdir()
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"img/{name}.png")
    (tmp_path / "img/labels.json").write_text("[]")
    run = tmp_path / "runs/one"
    (run / "checkpoints/step-00000004/part").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.json", "train.json is a JSON file, no model; the model comes first: name a run, a folder with a model"),
        ("train.csv", "train.csv is a CSV table, no model; the model comes first"),
        ("img/a.png", "a.png is a PNG picture, no model; the model comes first"),
        ("stage2.yaml", "stage2.yaml is a stage file, no model; name the run that it trains, runs/smoke-stage2"),
        ("page.bin", "page.bin is an HTML page, as a failed download leaves one, no model; download the file again"),
        ("pointer.safetensors", "a Git LFS pointer, which stands for a file that was not fetched: .*git lfs pull"),
        ("img", "img holds a.png, b.png, c.png, labels.json: data, no model; name a run"),
        ("runs", "runs holds one: runs; name one of them, such as .*runs/one"),
        ("runs/one", "runs/one holds .*: a run without a model, which it writes when it has ended"),
        ("runs/one/checkpoints", "checkpoints, from which a run continues, and no model; .* name .*runs/one then"),
        ("runs/one/checkpoints/step-00000004", "from which a run continues, and no model; .* name .*runs/one then"),
        ("llama", "llama holds config.json: a llama alone, not a LLaVA; .*understood are"),
    ],
)
def test_it_is_said_what_it_is(name: str, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_llava(folder / name)
    with pytest.raises(HandOffError, match="init_from: ") as of_stage:
        check_init(str(folder / name))
    for error in (raised.value, of_stage.value):
        for advice in ("weights_only", "PyTorch", "run code"):
            assert advice not in str(error)


def test_a_pickle_with_code_is_named_without_advice_to_run_it(tmp_path: Path) -> None:
    torch.save({"x": print}, tmp_path / "a.bin")
    with pytest.raises(
        ForeignError, match=r"a.bin holds more than tensors \((builtins\.)?print\), which could run"
    ) as raised:
        kind_of(tmp_path / "a.bin")
    assert "weights_only" not in str(raised.value) and "option" not in str(raised.value)
