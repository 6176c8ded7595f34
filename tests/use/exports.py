"""Models to export, runs that left them, and processes that use the exports without llava_train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from llava_train.config import RandomLanguageModel, RandomVisionTower
from llava_train.files import write_manifest
from llava_train.model.build import Llava
from llava_train.model.trainable import set_trainable
from llava_train.model.weights import export_model
from llava_train.stage_file import parse_stage
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, encoder_of, model_section, stage_content, tiny_llava
from tests.train.helpers import environment

QUESTION = "What is it?"
RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 90), "blue")
LORA = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-4, "lora": {"rank": 2, "alpha": 4}}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llava_of(
    tower: str = "clip_vision_model", template: str = "vicuna_v1", tokenizer: str = "bytes", **language_model: Any
) -> Llava:
    """A tiny model whose parts were never trained. `language_model` are keys of the config of a Llama."""
    has_class_token = tower != "siglip_vision_model"
    section = model_section(
        vision_tower=RandomVisionTower(config={**VISION_TOWER, "model_type": tower}),
        language_model=RandomLanguageModel(config={**LANGUAGE_MODEL, **language_model}, tokenizer=tokenizer),
        vision_feature_select="patch" if has_class_token else "full",
        chat_template=template,
    )
    llava = tiny_llava(section)
    llava.model.model.language_model.set_attn_implementation("sdpa")
    return llava


def export_tiny(folder: Path, chat_template: str = "chatml") -> Path:
    """An exported model in `folder`."""
    llava = tiny_llava(model_section(chat_template=chat_template))
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), folder)
    return folder


def write_run(run_dir: Path, **changes: Any) -> Path:
    """A finished run of stage 2: `model/`, with LoRA `adapter/`, config.yaml and metrics.jsonl."""
    content = stage_content(Path("/home/me/secret/data.json"), name=run_dir.name, **changes)
    config = parse_stage(content, "test")
    llava = tiny_llava(config.model)
    peft_model = set_trainable(llava.model, config.trainable)
    with torch.no_grad():
        for name, parameter in llava.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), run_dir / "model", peft_model)
    write_manifest(run_dir / "model")
    about = {"data": [{"path": "/home/me/secret/data.json", "name": "data", "n_samples": 12345}]}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**json.loads(config.model_dump_json()), "about": about}))
    lines = [{"step": 9, "loss": 2.0}, {"step": 10, "loss": 1.25}, {"step": 10, "eval_loss": 1.5}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def write_picture(path: Path) -> Path:
    """A picture of noise, wider than high."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def use_plainly(folder: Path, models: dict[str, Path], first: Path | None = None) -> dict[str, Any]:
    """What `plain_use.py` finds in exported models.

    Args:
        folder: for the files of this.
        first: what stands first on the path, such as another transformers.
    """
    spec = {name: str(path) for name, path in models.items()}
    picture = write_picture(folder / "picture.png")
    (folder / "spec.json").write_text(json.dumps({"models": spec, "image": str(picture), "question": QUESTION}))
    script = Path(__file__).with_name("plain_use.py")
    done = subprocess.run(
        [sys.executable, "-s", str(script), str(folder / "spec.json"), str(folder / "found.json")],
        cwd=folder,
        env=environment(PYTHONPATH=str(first or "")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((folder / "found.json").read_text()))
