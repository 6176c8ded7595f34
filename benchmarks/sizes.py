"""Sizes of models, as transformers configures them, that several benchmarks use."""

from __future__ import annotations

from typing import Any


def sizes(model_type: str, hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    found = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": model_type, **found, **more}


TINY_LM = sizes("llama", 64, 128, 2, 4, num_key_value_heads=2)
TINY_TOWER = sizes("clip_vision_model", 32, 64, 3, 2, image_size=56, patch_size=14)
VICUNA_7B = sizes("llama", 4096, 11_008, 32, 32, vocab_size=32_064, max_position_embeddings=4096)
CLIP_L_336 = sizes("clip_vision_model", 1024, 4096, 24, 16, image_size=336, patch_size=14)
VICUNA_13B = sizes("llama", 5120, 13_824, 40, 40, vocab_size=32_064, max_position_embeddings=4096)
CLIP_L_224 = {**CLIP_L_336, "image_size": 224}
