"""Tiny checkpoints under the names of tensors and settings that the original LLaVA writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import gelu, linear
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_train.config import ModelSection
from llava_train.model.build import Llava
from llava_train.model.processor import byte_tokenizer
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, model_section

State = dict[str, torch.Tensor]

PIXELS = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))

N_TOKENS = len(byte_tokenizer())
_TEXT = {key: value for key, value in LANGUAGE_MODEL.items() if key != "model_type"}
_VISION = {key: value for key, value in VISION_TOWER.items() if key != "model_type"}


def settings(tower: Path, **changes: Any) -> dict[str, Any]:
    """A config.json as liuhaotian/llava-v1.5-7b has it."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **_TEXT,
        "vocab_size": N_TOKENS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "max_length": 4096,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        **changes,
    }


def language_model(seed: int = 1) -> LlamaForCausalLM:
    """A llama by hand, with the settings above."""
    torch.manual_seed(seed)
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = LlamaConfig(
        **_TEXT, vocab_size=N_TOKENS, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_parameters=scaling
    )
    return LlamaForCausalLM(config).eval()


def vision_tower(seed: int = 2) -> CLIPVisionModel:
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(**_VISION)).eval()


def projector(seed: int = 3, linear: bool = False, width: int = 32, prefix: str = "model.mm_projector.") -> State:
    torch.manual_seed(seed)
    layers = [""] if linear else ["0.", "2."]
    state = {}
    for layer in layers:
        state[f"{prefix}{layer}weight"] = torch.randn(width, width) / 4
        state[f"{prefix}{layer}bias"] = torch.randn(width) / 4
    return state


def tower_state(tower: CLIPVisionModel) -> State:
    """A trained tower's tensors, as they stand in a checkpoint; `position_ids` as old versions wrote."""
    named = {name.removeprefix("vision_model."): t.clone() for name, t in tower.state_dict().items()}
    named["embeddings.position_ids"] = torch.arange(5)[None]
    return {f"model.vision_tower.vision_tower.vision_model.{name}": t for name, t in named.items()}


def save_parts(folder: Path) -> tuple[Path, Path]:
    """Folders of the language model (with its tokenizer) and the vision tower, as their authors publish them."""
    base, tower = folder / "vicuna", folder / "clip-tiny"
    language_model().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    vision_tower().save_pretrained(tower)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tower)
    return base, tower


def section_of(base: Path, tower: Path, **changes: Any) -> ModelSection:
    return model_section(language_model=str(base), vision_tower=str(tower), **changes)


def save_tensors(state: State, folder: Path, suffix: str = ".bin", n_shards: int = 1) -> None:
    name = {".bin": "pytorch_model", ".safetensors": "model"}[suffix]
    names = sorted(state)
    weight_map = {}
    for shard in range(n_shards):
        file = f"{name}{suffix}" if n_shards == 1 else f"{name}-{shard + 1:05}-of-{n_shards:05}{suffix}"
        part = {key: state[key].clone().contiguous() for key in names[shard::n_shards]}
        weight_map.update(dict.fromkeys(part, file))
        if suffix == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if n_shards > 1:
        (folder / f"{name}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_full(
    folder: Path, tower: Path, extra: State | None = None, suffix: str = ".bin", n_shards: int = 1, **changes: Any
) -> Path:
    """A full checkpoint of `language_model()` and `projector()`."""
    folder.mkdir()
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings(tower, **changes)))
    state = {**language_model().state_dict(), **(projector() if extra is None else extra)}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_tensors(state, folder, suffix, n_shards)
    return folder


def adapters(seed: int = 4, rank: int = 2) -> State:
    """LoRA tensors for two layers, in the original's naming."""
    torch.manual_seed(seed)
    state = {}
    for name, n_in, n_out in (("0.self_attn.q_proj", 32, 32), ("1.mlp.down_proj", 64, 32)):
        prefix = f"base_model.model.model.layers.{name}"
        state[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in)
        state[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank)
    return state


def save_lora(folder: Path, base: Path | str, tower: Path, suffix: str = ".bin", **changes: Any) -> Path:
    """Adapters for `base`, and `projector(seed=5)` beside them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings(tower)))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none",
        "r": 2, "lora_alpha": 6, "lora_dropout": 0.05, "inference_mode": True, "fan_in_fan_out": False,
        "target_modules": "model.layers.(0.self_attn.q_proj|1.mlp.down_proj)",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if suffix == ".bin":
        torch.save(adapters(), folder / "adapter_model.bin")
    else:
        save_file(adapters(), folder / "adapter_model.safetensors")
    torch.save(projector(seed=5, prefix="base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin")
    return folder


@torch.no_grad()
def expected_logits(
    projector: State, lm: LlamaForCausalLM | None = None, tower: CLIPVisionModel | None = None, full: bool = False
) -> torch.Tensor:
    """Logits of "<image>ab" by hand: the features of layer -2 through the projector, before two embeddings."""
    lm, tower = lm or language_model(), tower or vision_tower()
    features = tower(PIXELS, output_hidden_states=True).hidden_states[-2][:, 0 if full else 1 :]
    tensors = list(projector.values())
    hidden = linear(features, *tensors[:2])
    if len(tensors) == 4:
        hidden = linear(gelu(hidden), *tensors[2:])
    words = lm.get_input_embeddings()(torch.tensor([[65, 66]]))
    return lm(inputs_embeds=torch.cat([hidden, words], dim=1)).logits


@torch.no_grad()
def logits_of(llava: Llava) -> torch.Tensor:
    assert not llava.model.training
    image = llava.model.config.image_token_id
    input_ids = torch.tensor([[image] * llava.n_image_tokens + [65, 66]])
    return llava.model(input_ids=input_ids, pixel_values=PIXELS).logits[..., :N_TOKENS]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def sdpa(llava: Llava) -> Llava:
    llava.model.set_attn_implementation("sdpa")
    return llava


def merged_by_hand(scale: float) -> LlamaForCausalLM:
    """base + B A * scale."""
    model, state = language_model(), adapters()
    for name in {key.rsplit(".", 2)[0] for key in state}:
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        layer.weight.data += state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] * scale
    return model
