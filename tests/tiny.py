"""Tiny models and data sets with which the real code runs in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_train.config import (
    ImageSection,
    ModelSection,
    RandomLanguageModel,
    RandomVisionTower,
    StageConfig,
)
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor
from llava_train.data.loader import StepDataset
from llava_train.data.mixture import Mixture
from llava_train.data.sources import open_source
from llava_train.model.build import Llava, build_llava
from llava_train.stage_file import parse_stage

LANGUAGE_MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def model_section(**changes: Any) -> ModelSection:
    settings: dict[str, Any] = {
        "language_model": RandomLanguageModel(config=LANGUAGE_MODEL),
        "vision_tower": RandomVisionTower(config=VISION_TOWER),
        "chat_template": "vicuna_v1",
    }
    return ModelSection(**{**settings, **changes})


def tiny_llava(section: ModelSection | None = None, dtype: torch.dtype = torch.float32) -> Llava:
    """A LLaVA of random parts with the chat template of its section."""
    section = section or model_section()
    llava = build_llava(section, ImageSection(), dtype)
    llava.processor.chat_template = load_template(section.chat_template, llava.tokenizer)
    return llava


def encoder_of(llava: Llava, max_tokens: int = 1024, over_long: Any = "error") -> ChatEncoder:
    return ChatEncoder(
        llava.tokenizer, llava.processor.chat_template, llava.n_image_tokens, max_tokens, over_long=over_long
    )


def write_data(folder: Path, n_samples: int = 12, seed: int = 0, text_only: bool = False) -> Path:
    """A LLaVA JSON file of one to three turns; every third sample has no image. Returns its path."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n_samples):
        turns = []
        has_image = not text_only and i % 3 != 0
        for number in range(rng.randint(1, 3)):
            mark = "<image>\n" if has_image and number == 0 else ""
            turns.append({"from": "human", "value": mark + "what " * rng.randint(1, 8) + "?"})
            turns.append({"from": "gpt", "value": "it is " + "so " * rng.randint(1, 12) + "."})
        row: dict[str, Any] = {"id": f"sample-{i}", "conversations": turns}
        if has_image:
            row["image"] = f"images/{seed}-{i}.png"
            colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60)), colour).save(folder / row["image"])
        rows.append(row)
    path = folder / f"data-{seed}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def stage_content(data: Path, **changes: Any) -> dict[str, Any]:
    """The content of a stage file that trains projector and language model of a tiny LLaVA."""
    content: dict[str, Any] = {
        "name": "tiny",
        "model": model_section().model_dump(mode="json"),
        "init_from": "random",
        "trainable": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}},
        "data": [{"path": str(data)}],
        "batch": {"size": 6, "max_tokens": 2048, "max_sample_tokens": 1024},
        "engine": {"zero": 0, "precision": "fp32"},
        "loader": {"workers": 0},
        "logging": {"every": 1},
    }
    return {**content, **changes}


def stage(data: Path, **changes: Any) -> StageConfig:
    return parse_stage(stage_content(data, **changes), "test")


def dataset_of(llava: Llava, data: Path, **settings: Any) -> StepDataset:
    """Steps over a data file, 6 samples each."""
    defaults: dict[str, Any] = {"batch_size": 6, "max_tokens": 2048, "seed": 0}
    preprocessor = ImagePreprocessor(llava.processor.image_processor)
    return StepDataset(Mixture([open_source(data)]), encoder_of(llava), preprocessor, **{**defaults, **settings})
