"""`pytest --nbmake notebooks/` runs every notebook on tiny random parts and for a few steps.

A notebook works in the checkout. Here it works in a folder that looks like the checkout after the quickstart, with
the same stage files but for sizes and steps, so that the cells that readers run are the ones that are tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]

LANGUAGE_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 16384,  # answers of random bytes are long ones when they are read again
}
VISION_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
FEWER: dict[str, Any] = {
    "schedule": {"max_steps": 2, "epochs": 2},
    "batch": {"size": 16, "max_tokens": 4096, "max_sample_tokens": 1024},
    "checkpoint": {"every": 2},
    "logging": {"every": 1},
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """The folder of a notebook, for as long as it runs; its kernel inherits the environment."""
    if item.path.suffix != ".ipynb":
        return (yield)
    home = Path(tempfile.mkdtemp(prefix="llava-train-notebook-"))
    inherited = dict(os.environ)
    imports = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ |= {"LLAVA_TRAIN_TINY": str(home), "PYTHONPATH": imports, "JUPYTER_PREFER_ENV_PATH": "1"}
    try:
        make_home(home, is_trained=not item.path.name.startswith("1-"))
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(inherited)
        shutil.rmtree(home)


def make_home(home: Path, is_trained: bool) -> None:
    """A tiny checkout: parts, scenes, the stage files of `configs/small`, and with `is_trained` their runs."""
    (home / "data").mkdir()
    for script in (ROOT / "data").glob("*.*"):
        (home / "data" / script.name).symlink_to(script)
    make_parts(home / "parts")
    stages = [write_stage(home / "configs/small" / f"{stage}.yaml") for stage in ("stage1", "stage2")]
    sizes = ["--captions", "16", "--conversations", "16", "--held-out", "6"]
    _run(home, "data/draw_scenes.py", "--out", "data/scenes", *sizes)
    if is_trained:
        _run(home, "-m", "llava_train", "train", "--config", *map(str, stages))


def make_parts(folder: Path) -> None:
    """A language model and a vision encoder of random weights, in the architecture of the small ones."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

    from llava_train.model.processor import byte_tokenizer

    tokenizer, language_model = byte_tokenizer(), folder / "smollm2-135m-instruct"
    tokenizer.save_pretrained(language_model)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LANGUAGE_MODEL)).save_pretrained(language_model)
    Dinov2Model(Dinov2Config(**VISION_TOWER)).save_pretrained(folder / "dinov2-small")
    BitImageProcessorPil().save_pretrained(folder / "dinov2-small")


def write_stage(path: Path) -> Path:
    """The stage file of `configs/small` with fewer samples and steps."""
    content = yaml.safe_load((ROOT / "configs/small" / path.name).read_text(encoding="utf-8"))
    content["eval"] |= {"every": 2, "max_samples": 4, "generate": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, **FEWER}, sort_keys=False), encoding="utf-8")
    return path


def _run(home: Path, *command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=home, check=True, stdout=subprocess.DEVNULL)
