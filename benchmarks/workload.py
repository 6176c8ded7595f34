"""The work that every trainer of a comparison does: the same weights, the same samples, the same optimizer steps.

`make_workload` writes a folder:

    model/          the starting point as transformers reads it: weights, processor
    original/       the same as the original LLaVA reads it, where the encoder is a CLIP (`original_parts.py`)
    template.jinja  its chat template, with generation marks
    stage.yaml      what llava_train trains
    data.json       the samples for llava_train, in an order that its shuffling turns into that of `samples`
    images/         their pictures, JPEG
    workload.json   the `Workload`: settings, and the samples in the order of the optimizer steps

Lengths and turns are those of mix665k (`mix665k.py`), texts plain words, pictures drawn scenes. The chat template is
ChatML whose new line after an answer is supervised: the one format that all trainers can write token by token alike.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mix665k import DrawnSample, draw_samples, draw_small_samples
from original_parts import tokens_of, write_original
from transformers import PreTrainedTokenizerBase

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED, ChatEncoder, EncodedSample
from llava_train.data.order import step_samples
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.data.samples import parse_record
from llava_train.devices import DTYPES
from llava_train.model.build import Llava
from llava_train.model.weights import export_model
from llava_train.stage_file import parse_stage
from llava_train.train.stage import _encoder, _starting_point

ROOT = Path(__file__).parents[1]
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- set text -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if not loop.first and 'image' in (part.type, loop.previtem.type) -%}{{- '\\n' -}}{%- endif -%}
                {{- '<image>' if part.type == 'image' else part.text -}}
            {%- endfor -%}
        {%- endif -%}
    {%- endset -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- text + '<|im_end|>\\n' -}}{%- endgeneration -%}
    {%- else -%}
        {{- text + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_WORDS = (
    "the man and woman look at a large red house with green door while their dog runs over grass near old stone wall "
    "under blue sky where white clouds move slowly from left to right above small boat on water as people walk by"
).split()
_PHOTO = (640, 480)
_RATES = {"1": {"projector": 1e-3}, "2": {"projector": 2e-5, "language_model": 2e-5}}


@dataclass(frozen=True)
class Shape:
    """A model, and samples for it."""

    model: dict[str, Any]
    """The model section of a stage file, less the template; `PARTS/` stands for the folder of the small parts."""
    draw: Callable[[int, int], list[DrawnSample]]
    """`draw(n, seed)`: lengths and turns of n samples."""
    batch_size: int
    precision: str = "bf16"
    image: dict[str, Any] = field(default_factory=lambda: {"aspect": "pad"})
    max_tokens: int = 4096
    """Of one of llava_train's packs."""
    stage: str = "2"
    """What trains if nothing else is asked for: see `trainable_of`."""
    engine: dict[str, Any] = field(default_factory=lambda: {"zero": 0, "activation_checkpointing": "none"})
    cuda_only: bool = False


def _captions(n: int, seed: int) -> list[DrawnSample]:
    """As LLaVA's 558K: one short question and a caption of 10 to 45 tokens, always with a picture."""
    rng = random.Random(seed)
    lengths = [(8, rng.randint(10, 45)) for _ in range(n)]
    return [DrawnSample("captions", True, (turn,), sum(turn) + 576, turn[1]) for turn in lengths]


def _random(config: dict[str, Any]) -> dict[str, Any]:
    return {"config": config}


_TINY_LM = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TINY_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_DINOV2_SMALL_AS_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 112,
    "patch_size": 14,
}
_VICUNA_7B = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}  # else LLaMA-7B, the default
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_7B = {"language_model": _random(_VICUNA_7B), "vision_tower": _random(_CLIP_L_336)}
_ON_GPU: dict[str, Any] = {"zero": 0, "activation_checkpointing": "auto"}
SHAPES = {
    "tiny": Shape(
        {"language_model": _random(_TINY_LM), "vision_tower": _random(_TINY_TOWER)},
        lambda n, seed: draw_samples(n, seed, n_image_tokens=16, max_tokens=200, min_tokens=60, one_turn=0.41),
        batch_size=4,
        precision="fp32",
    ),
    "small": Shape(
        {"language_model": "PARTS/smollm2-135m-instruct", "vision_tower": "PARTS/dinov2-small"},
        draw_small_samples,
        batch_size=8,
        image={"aspect": "pad", "size": 112},
    ),
    # For the original LLaVA, which knows CLIP only: as `small`, the encoder's weights random, its shape DINOv2-small's.
    "small-clip": Shape(
        {"language_model": "PARTS/smollm2-135m-instruct", "vision_tower": _random(_DINOV2_SMALL_AS_CLIP)},
        draw_small_samples,
        batch_size=8,
    ),
    "7b-lora": Shape(_7B, draw_samples, 32, max_tokens=8192, stage="lora", engine=_ON_GPU, cuda_only=True),
    "7b-stage1": Shape(_7B, _captions, 64, max_tokens=16384, stage="1", engine=_ON_GPU, cuda_only=True),
}


def trainable_of(stage: str) -> dict[str, Any]:
    """`trainable` of a stage file: `1` the projector, `2` also the language model in full, `lora` through adapters.

    Adapters have no dropout here, whose random numbers would tell the trainers' losses apart.
    """
    if stage == "lora":
        lora = {"rank": 128, "alpha": 256, "dropout": 0.0}
        return {"projector": {"lr": 2e-5}, "language_model": {"lr": 2e-5, "lora": lora}}
    return {part: {"lr": lr} for part, lr in _RATES[stage].items()}


def make_workload(
    folder: Path, shape: Shape, n_steps: int, parts: Path, seed: int, formats: Container[str]
) -> dict[str, Any]:
    """Writes a workload into an empty folder; returns what `workload.json` holds.

    Args:
        n_steps: optimizer steps, one epoch of samples in all.
        parts: what data/build_small_parts.py made, for the shapes that need it.
        formats: which of `model` and `original` to write, which llava_train itself does not need.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    content = _stage_content(folder, shape, n_steps, parts, seed)
    config = parse_stage(content, "the benchmark's stage")
    (folder / "stage.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    llava, _ = _starting_point(config)
    encoder = _encoder(config, llava)
    samples, encoded = _write_samples(folder, shape, encoder, n_steps, seed)
    _write_for_llava_train(folder / "data.json", samples, shape.batch_size, seed)
    if "model" in formats:
        export_model(llava.model, llava.processor, encoder.end_of_turn_id(), folder / "model")
    if "original" in formats and llava.model.config.vision_config.model_type == "clip_vision_model":
        write_original(llava, folder / "original")
        _write_tokens(folder / "original" / "tokens.json", encoder, samples, encoded)
    workload = {
        "stage": shape.stage,
        "trainable": content["trainable"],
        "precision": shape.precision,
        "batch_size": shape.batch_size,
        "n_steps": n_steps,
        "seed": seed,
        "n_image_tokens": llava.n_image_tokens,
        "parameters": _parameters(llava, config),
        "samples": samples,
    }
    (folder / "workload.json").write_text(json.dumps(workload), encoding="utf-8")
    return workload


def _stage_content(folder: Path, shape: Shape, n_steps: int, parts: Path, seed: int) -> dict[str, Any]:
    model = {
        key: part.replace("PARTS", str(parts.resolve())) if isinstance(part, str) else part
        for key, part in shape.model.items()
    }
    return {
        "name": "none",
        "seed": seed,
        "model": {**model, "chat_template": str(folder / "template.jinja")},
        "init_from": "random",
        "trainable": trainable_of(shape.stage),
        "data": [{"path": str(folder / "data.json")}],
        "image": shape.image,
        "batch": {"size": shape.batch_size, "max_tokens": shape.max_tokens, "max_sample_tokens": shape.max_tokens},
        "schedule": {"max_steps": n_steps, "lr": "constant", "warmup": 0.0},
        "engine": {**shape.engine, "precision": shape.precision},
        "loader": {"workers": 1},
        "checkpoint": {"every": None},
        "logging": {"every": 1},
        "output": str(folder / "runs"),
    }


def _write_samples(
    folder: Path, shape: Shape, encoder: ChatEncoder, n_steps: int, seed: int
) -> tuple[list[dict[str, Any]], list[EncodedSample]]:
    """Samples in the order of the steps, as LLaVA's records with their numbers of tokens, and as tokens."""
    rng, pictures = random.Random(seed), Pictures(PictureFolder(folder))
    samples, tokens = [], []
    for number, drawn in enumerate(shape.draw(n_steps * shape.batch_size, seed)):
        record = _record(number, drawn, encoder.tokenizer, rng)
        if drawn.has_image:
            _draw_picture(rng).save(folder / record["image"], quality=90)
        encoded = encoder.encode(parse_record(record, pictures, ""))
        n_supervised = int((encoded.labels != IGNORED).sum())
        samples.append({**record, "n_tokens": encoded.n_tokens, "n_supervised": n_supervised})
        tokens.append(encoded)
    return samples, tokens


def _write_tokens(path: Path, encoder: ChatEncoder, samples: list[dict[str, Any]], encoded: list[EncodedSample]) -> None:
    image_token_id, n_image_tokens = encoder.image_token_id, encoder.n_image_tokens
    by_id = {
        sample["id"]: tokens_of(tokens, image_token_id, n_image_tokens)
        for sample, tokens in zip(samples, encoded, strict=True)
    }
    path.write_text(json.dumps({"image_token_id": image_token_id, "samples": by_id}), encoding="utf-8")


def _record(number: int, drawn: DrawnSample, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {"id": str(number), "conversations": []}
    if drawn.has_image:
        record["image"] = f"images/{number}.jpg"
    for turn, (n_question, n_answer) in enumerate(drawn.turns):
        mark = "<image>\n" if drawn.has_image and turn == 0 else ""
        question, answer = (text_of(n_tokens, tokenizer, rng) for n_tokens in (n_question, n_answer))
        record["conversations"] += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return record


def text_of(n_tokens: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> str:
    """Plain words of so many tokens; one fewer where the last would be a space."""
    text = " ".join(rng.choices(_WORDS, k=n_tokens))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: offsets[n_tokens - 1][1]].strip()


def _draw_picture(rng: random.Random) -> Any:
    if str(ROOT / "data") not in sys.path:
        sys.path.append(str(ROOT / "data"))
    from draw_scenes import TRAINING, plan_scene
    from scene_pictures import draw_scene

    return draw_scene(plan_scene(rng, rng.randint(1, 3), TRAINING)).resize(_PHOTO)


def _write_for_llava_train(path: Path, samples: Sequence[dict[str, Any]], batch_size: int, seed: int) -> None:
    """The records so placed that the k-th sample that llava_train trains on is `samples[k]`."""
    placed: list[dict[str, Any]] = [{}] * len(samples)
    order = [i for step in range(len(samples) // batch_size) for i in step_samples(step, seed, len(samples), batch_size)]
    for sample, index in zip(samples, order, strict=True):
        placed[index] = {key: sample[key] for key in ("id", "image", "conversations") if key in sample}
    path.write_text(json.dumps(placed), encoding="utf-8")


def _parameters(llava: Llava, config: StageConfig) -> dict[str, int]:
    model = llava.model.model
    parts = {part: getattr(model, name) for part, name in _MODULES.items()}
    assert llava.model.dtype == DTYPES[config.engine.precision]
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


_MODULES = {"vision_tower": "vision_tower", "projector": "multi_modal_projector", "language_model": "language_model"}
