"""A workload as the original LLaVA reads it: a LLaMA folder, a CLIP folder, `mm_projector.bin`, and token ids.

Its code knows LLaMA-class language models and CLIP encoders only (transformers 4.36 of its pins has SmolLM2's
architecture, LLaMA). Token ids are given, since it writes no ChatML: -200 stands for an image, as in its own data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from transformers import PreTrainedModel

from llava_train.data.chat import EncodedSample
from llava_train.model.build import Llava
from llava_train.model.mm_projector import save_mm_projector

IMAGE_TOKEN_INDEX = -200


def write_original(llava: Llava, folder: Path) -> None:
    """Writes `language_model/`, `vision_tower/` and `mm_projector.bin`. The vision tower must be a CLIP."""
    language_model, vision_tower = llava.model.model.language_model, llava.model.model.vision_tower
    tied = llava.model.config.tie_word_embeddings
    state = {f"model.{name}": tensor for name, tensor in language_model.state_dict().items()}
    if not tied:
        state["lm_head.weight"] = llava.model.lm_head.weight.detach()
    _write_part(folder / "language_model", language_model, state, ["LlamaForCausalLM"])
    llava.tokenizer.save_pretrained(folder / "language_model")
    state = {f"vision_model.{name}": tensor for name, tensor in vision_tower.state_dict().items()}
    _write_part(folder / "vision_tower", vision_tower, state, ["CLIPVisionModel"])
    processor = llava.processor.image_processor
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": processor.crop_size["height"]},
        "crop_size": dict(processor.crop_size),
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "resample": int(processor.resample),
    }
    (folder / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_mm_projector(llava.model, folder / "mm_projector.bin")


def _write_part(folder: Path, part: PreTrainedModel, state: dict[str, Any], architectures: list[str]) -> None:
    folder.mkdir(parents=True)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(part.config.to_json_string(use_diff=False))
    config |= {"architectures": architectures, "torch_dtype": str(part.dtype).removeprefix("torch.")}
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def tokens_of(encoded: EncodedSample, image_token_id: int, n_image_tokens: int) -> dict[str, list[int]]:
    """Token ids and labels with one -200 for each image: `[5, I, I, I, 7]` of 3 tokens an image is `[5, -200, 7]`."""
    is_image = encoded.input_ids == image_token_id
    number = np.cumsum(is_image)  # of the image token, counted from 1
    kept = ~is_image | (number % n_image_tokens == 1 % n_image_tokens)
    input_ids = np.where(is_image, IMAGE_TOKEN_INDEX, encoded.input_ids)
    return {"input_ids": input_ids[kept].tolist(), "labels": encoded.labels[kept].tolist()}
