"""Models, and samples for them, on which trainers are compared.

`tiny` is for tests, `small` what two cores can train, `7b-lora` and `7b-stage1` are LLaVA-1.5-7B's shapes with random
weights: how fast a model trains does not depend on what it has learnt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mix665k import DrawnSample, draw_samples, draw_small_samples
from sizes import CLIP_L_336, TINY_LM, TINY_TOWER, VICUNA_7B, sizes


@dataclass(frozen=True)
class Shape:
    """A model, and samples for it."""

    model: dict[str, Any]
    """The model section of a stage file, less the template; `PARTS/` stands for the folder of the small parts."""
    draw: Callable[[int, int], list[DrawnSample]]
    """`draw(n, seed)`: lengths and turns of n samples."""
    batch_size: int
    micro_batch: int
    """Samples that a trainer which pads computes at once, unless its variant says otherwise."""
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


_DINOV2_SMALL_AS_CLIP = sizes("clip_vision_model", 384, 1536, 12, 6, image_size=112, patch_size=14)
_7B = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}  # else LLaMA-7B, the default
_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_7B = {"language_model": _random(VICUNA_7B), "vision_tower": _random(CLIP_L_336)}
_ON_GPU: dict[str, Any] = {"zero": 0, "activation_checkpointing": "auto"}
SHAPES = {
    "tiny": Shape(
        {"language_model": _random(TINY_LM), "vision_tower": _random(TINY_TOWER)},
        lambda n, seed: draw_samples(n, seed, n_image_tokens=16, max_tokens=200, min_tokens=60, one_turn=0.41),
        batch_size=4,
        micro_batch=4,
        precision="fp32",
    ),
    "small": Shape(
        {"language_model": "PARTS/smollm2-135m-instruct", "vision_tower": "PARTS/dinov2-small"},
        draw_small_samples,
        batch_size=8,
        micro_batch=1,  # no padding: on a CPU twice to four times as fast as larger ones
        image={"aspect": "pad", "size": 112},
    ),
    # For the original LLaVA, which knows CLIP only: as `small`, the encoder's weights random, its shape DINOv2-small's.
    "small-clip": Shape(
        {"language_model": "PARTS/smollm2-135m-instruct", "vision_tower": _random(_DINOV2_SMALL_AS_CLIP)},
        draw_small_samples,
        batch_size=8,
        micro_batch=1,
    ),
    "7b-lora": Shape(_7B, draw_samples, 32, 4, max_tokens=8192, stage="lora", engine=_ON_GPU, cuda_only=True),
    "7b-stage1": Shape(_7B, _captions, 64, 8, max_tokens=16384, stage="1", engine=_ON_GPU, cuda_only=True),
}


_RATES = {"1": {"projector": 1e-3}, "2": {"projector": 2e-5, "language_model": 2e-5}}


def trainable_of(stage: str) -> dict[str, Any]:
    """`trainable` of a stage file: `1` the projector, `2` also the language model in full, `lora` through adapters.

    Adapters have no dropout here, whose random numbers would tell the trainers' losses apart.
    """
    if stage == "lora":
        lora = {"rank": 128, "alpha": 256, "dropout": 0.0}
        return {"projector": {"lr": 2e-5}, "language_model": {"lr": 2e-5, "lora": lora}}
    return {part: {"lr": lr} for part, lr in _RATES[stage].items()}
