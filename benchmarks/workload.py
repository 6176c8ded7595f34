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
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import yaml
from mix665k import DrawnSample
from original_parts import tokens_of, write_original
from peer_shapes import Shape, trainable_of
from transformers import PreTrainedTokenizerBase

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED, ChatEncoder, EncodedSample
from llava_train.data.formats import parse_record
from llava_train.data.order import step_samples
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.devices import DTYPES
from llava_train.model.build import Llava
from llava_train.model.weights import export_model
from llava_train.stage_file import parse_stage
from llava_train.train.assembly import chat_encoder, starting_point

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
_WORDS = """
the man and woman look at a large red house with green door while their dog runs over grass near old stone wall under
blue sky where white clouds move slowly from left to right above small boat on water as people walk by
""".split()  # noqa: SIM905 (a list would be a page)
_PHOTO = (640, 480)


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
    llava, _ = starting_point(config)
    encoder = chat_encoder(config, llava)
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
        "micro_batch": shape.micro_batch,
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


def _write_tokens(
    path: Path, encoder: ChatEncoder, samples: list[dict[str, Any]], encoded: list[EncodedSample]
) -> None:
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
    steps = range(len(samples) // batch_size)
    order = [i for step in steps for i in step_samples(step, seed, len(samples), batch_size)]
    for sample, index in zip(samples, order, strict=True):
        placed[index] = {key: sample[key] for key in ("id", "image", "conversations") if key in sample}
    path.write_text(json.dumps(placed), encoding="utf-8")


def _parameters(llava: Llava, config: StageConfig) -> dict[str, int]:
    model = llava.model.model
    parts = {part: getattr(model, name) for part, name in _MODULES.items()}
    assert llava.model.dtype == DTYPES[config.engine.precision]
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


_MODULES = {"vision_tower": "vision_tower", "projector": "multi_modal_projector", "language_model": "language_model"}
