"""The count of model FLOPs against torch's own, of what really runs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_train.config import RandomLanguageModel, RandomVisionTower, TrainableSection
from llava_train.data.loader import PackedBatch
from llava_train.model import attention, cpu_attention
from llava_train.model.attention import attend_by_document
from llava_train.model.build import Llava
from llava_train.model.features import encode
from llava_train.model.loss import PackedLoss, summed_cross_entropy
from llava_train.model.standardize import standardize
from llava_train.model.trainable import set_trainable
from llava_train.train.metrics import ModelFlops, PackWork, Yardstick, model_flops, n_pairs, peak_memory_bytes
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, dataset_of, model_section, tiny_llava, write_data

QWEN2 = {**LANGUAGE_MODEL, "model_type": "qwen2", "tie_word_embeddings": True, "num_hidden_layers": 3}
WIDE_HEADS = {**LANGUAGE_MODEL, "model_type": "qwen3", "head_dim": 24, "num_key_value_heads": 1}
CLIP = VISION_TOWER
SIGLIP = {**VISION_TOWER, "model_type": "siglip_vision_model", "intermediate_size": 96}
DINO = {k: v for k, v in VISION_TOWER.items() if k != "intermediate_size"} | {"model_type": "dinov2", "mlp_ratio": 3}
SWIGLU = {**DINO, "use_swiglu_ffn": True}
REGISTERS = {**DINO, "model_type": "dinov2_with_registers", "num_register_tokens": 4}

RATE = {"lr": 1e-3}
LORA = {**RATE, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
PROJECTOR = {"projector": RATE}
FULL = {"projector": RATE, "language_model": RATE}
ALL = {**FULL, "vision_tower": RATE}
WITH_LORA = {"projector": RATE, "language_model": LORA}
LORA_ALONE = {"language_model": LORA}
TOWER_ALONE = {"vision_tower": RATE}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "projector": (LANGUAGE_MODEL, CLIP, PROJECTOR, {}),
    "full": (LANGUAGE_MODEL, CLIP, FULL, {}),
    "all": (LANGUAGE_MODEL, CLIP, ALL, {}),
    "lora": (LANGUAGE_MODEL, CLIP, WITH_LORA, {}),
    "lora-alone": (LANGUAGE_MODEL, CLIP, LORA_ALONE, {}),
    "tower-alone": (LANGUAGE_MODEL, CLIP, TOWER_ALONE, {}),
    "last-layer": (LANGUAGE_MODEL, CLIP, ALL, {"vision_feature_layer": -1, "vision_feature_select": "full"}),
    "first-layer": (LANGUAGE_MODEL, CLIP, FULL, {"vision_feature_layer": 1}),
    "tied-projector": (QWEN2, SIGLIP, PROJECTOR, {"vision_feature_select": "full"}),
    "tied-full": (QWEN2, SIGLIP, FULL, {"vision_feature_select": "full", "vision_feature_layer": -1}),
    "tied-all": (QWEN2, SIGLIP, ALL, {"vision_feature_select": "full"}),
    "wide-heads-lora": (WIDE_HEADS, DINO, WITH_LORA, {}),
    "wide-heads-lora-alone": (WIDE_HEADS, SWIGLU, LORA_ALONE, {}),
    "wide-heads-all": (WIDE_HEADS, REGISTERS, ALL, {"vision_feature_select": "full"}),
}


def llava_of(language_model: dict, tower: dict, trainable: dict, section: dict) -> Llava:
    parts = {
        "language_model": RandomLanguageModel(config=language_model),
        "vision_tower": RandomVisionTower(config=tower),
    }
    llava = tiny_llava(model_section(**parts, **section))
    set_trainable(llava.model, TrainableSection(**trainable), seed=0)
    llava.model.train()
    return llava


def packs_of(llava: Llava, folder: Path, batch_size: int, **settings: Any) -> tuple[PackedBatch, ...]:
    return dataset_of(llava, write_data(folder, 6), seed=None, batch_size=batch_size, **settings)[0].micro_batches


def flops_that_run(llava: Llava, pack: PackedBatch) -> tuple[dict[str, int], int]:
    """What torch counts of a forward and backward pass, by part and in all; and what of it the features don't need.

    Attention is SDPA, taken apart into products: of its fused form on a CPU torch counts nothing.
    """
    whole_squares = mock.patch.object(cpu_attention, "LONGEST", 0)
    with whole_squares, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = PackedLoss(llava.model)(**pack.model_inputs())
        loss.backward()
    by_module = {name: sum(of_module.values()) for name, of_module in counter.get_flop_counts().items()}
    tower = "PackedLoss.llava.model.vision_tower"
    blocks = {
        name: int(name.rsplit(".", 1)[1]) for name in by_module if re.search(r"vision_tower\S*\.layers?\.\d+$", name)
    }
    index = llava.model.config.vision_feature_layer
    n_needed = index if index >= 0 else len(blocks) + 1 + index
    above = [name for name, number in blocks.items() if number >= n_needed] + [f"{tower}.head"]
    not_needed = sum(by_module.get(name, 0) for name in above)
    parts = {
        "encoder": encoder_flops_that_run(llava, pack.pixel_values) - not_needed,
        "projector": by_module.get("PackedLoss.llava.model.multi_modal_projector", 0),
        "head": head_flops_that_run(llava, pack.n_supervised),
    }
    return parts, by_module["Global"] - not_needed


def encoder_flops_that_run(llava: Llava, pixel_values: torch.Tensor) -> int:
    """Apart, for of the backward pass inside a larger one torch does not always tell the module."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = encode(llava.model, pixel_values)
        if features.requires_grad:
            features.sum().backward()
    return counter.get_total_flops()


def head_flops_that_run(llava: Llava, n_supervised: int) -> int:
    weight = llava.model.lm_head.weight
    hidden = torch.randn(n_supervised, weight.shape[1], requires_grad=True)
    targets = torch.zeros(n_supervised, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        summed_cross_entropy(hidden, weight, targets)[0].backward()
    return counter.get_total_flops()


def squares(flops: ModelFlops, lengths: tuple[int, ...]) -> int:
    """What attention takes where the whole square of each document is computed, as torch counts it."""
    return sum(per_pair * length**2 for _, per_pair in flops.attention for length in lengths)


def check_against_torch(llava: Llava, pack: PackedBatch) -> None:
    flops = model_flops(llava.model, llava.n_image_tokens)
    assert flops is not None
    ours, (theirs, total) = flops.of_pack(pack.lengths, pack.n_images, pack.n_supervised), flops_that_run(llava, pack)
    assert pack.n_images
    for part, count in theirs.items():
        assert count > 0
        assert getattr(ours, part) == pytest.approx(count, rel=1e-3), part
    whole_squares = replace(ours, attention=squares(flops, pack.lengths))
    assert whole_squares.total == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_torchs_own_of_what_runs(name: str, tmp_path: Path) -> None:
    llava = llava_of(*CASES[name])
    (pack,) = packs_of(llava, tmp_path, 4)
    check_against_torch(llava, pack)


@pytest.mark.parametrize("name", ["full", "lora", "wide-heads-all"])
def test_plain_attention_takes_as_much(name: str, tmp_path: Path) -> None:
    llava = llava_of(*CASES[name])
    llava.model.model.language_model.set_attn_implementation("eager")
    llava.model.model.vision_tower.set_attn_implementation("eager")
    packs = packs_of(llava, tmp_path, 2, packing=False)  # documents in one pack would take the square of all
    check_against_torch(llava, next(pack for pack in packs if pack.n_images))


def test_standardized_features_change_no_count() -> None:
    llava = llava_of(*CASES["full"])
    plain = model_flops(llava.model, llava.n_image_tokens)
    standardize(llava.model, torch.zeros(32), torch.ones(32), is_new=True)
    assert model_flops(llava.model, llava.n_image_tokens) == plain


def test_a_linear_projector_is_one_layer() -> None:
    both = [llava_of(LANGUAGE_MODEL, CLIP, PROJECTOR, {"projector": kind}) for kind in ("linear", "mlp2x_gelu")]
    linear, mlp = (model_flops(llava.model, llava.n_image_tokens) for llava in both)
    assert linear and mlp
    assert linear.projector == both[0].n_image_tokens * 4 * 32 * 32  # forward and its weight
    assert mlp.projector == both[0].n_image_tokens * (4 + 6) * 32 * 32


def test_features_from_a_cache_take_no_encoder() -> None:
    llava = llava_of(*CASES["full"])
    computed, cached = (model_flops(llava.model, llava.n_image_tokens, cached) for cached in (False, True))
    assert computed and cached and computed.encoder > 0
    assert cached == replace(computed, encoder=0)


@pytest.mark.parametrize(
    "config, windows",
    [
        ({"model_type": "mistral", "sliding_window": 8}, {8: 2}),
        ({"model_type": "mistral", "sliding_window": None}, {None: 2}),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            {None: 1, 8: 1},
        ),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, {None: 2}),
        ({"model_type": "phi3", "sliding_window": 8, "pad_token_id": 0}, {8: 2}),
        (LANGUAGE_MODEL, {None: 2}),
    ],
)
def test_each_layer_is_counted_with_the_window_that_it_attends_in(
    config: dict[str, Any], windows: dict[int | None, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llava = llava_of({**LANGUAGE_MODEL, **config}, CLIP, FULL, {})
    flops = model_flops(llava.model, llava.n_image_tokens)
    assert flops is not None
    assert dict(flops.attention) == {window: 12 * 32 * n_layers for window, n_layers in windows.items()}
    seen: Counter[int | None] = Counter()

    def attend(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen[arguments[-1]] += 1
        return attend_by_document(query, *arguments)

    monkeypatch.setattr(attention, "attend_by_document", attend)
    (pack,) = packs_of(llava, tmp_path, 1)
    PackedLoss(llava.model)(**pack.model_inputs())
    assert seen == windows


def test_experts_are_not_counted_rather_than_counted_wrong() -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    llava = llava_of({**LANGUAGE_MODEL, **experts}, CLIP, FULL, {})
    assert model_flops(llava.model, llava.n_image_tokens) is None


def of_shape(language_model: dict[str, Any], trainable: dict[str, Any]) -> ModelFlops:
    """The count of a model of published shape with CLIP ViT-L/14 at 336 pixels, without its weights."""
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = CLIPVisionConfig(**clip, image_size=336, patch_size=14)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=LlamaConfig(**language_model))
        )
        set_trainable(llava, TrainableSection(**trainable), seed=0)
    flops = model_flops(llava, 576)
    assert flops is not None
    return flops


def test_llava_7b_takes_what_is_published() -> None:
    """CLIP ViT-L/14 at 336 pixels by open_clip's docs/model_profile.csv, all 24 layers; a 7B by two FLOPs a weight."""
    flops = of_shape({}, PROJECTOR)
    assert flops.encoder * 24 / 23 == pytest.approx(381.92e9, rel=1e-3)
    in_layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert flops.linear == 4 * in_layers
    full = of_shape({}, FULL)
    assert full.linear == 6 * in_layers
    assert full.head == 6 * 4096 * 32000
    assert full.of_pack([2048], 0, 0).attention == 32 * 12 * 4096 * 2048 * 2049 // 2


def test_lora_on_llama_3_8b_is_within_5_percent_of_what_nemo_publishes() -> None:
    """NeMo AutoModel publishes 402 TFLOP/s at 12,473 tokens/s, on sequences of 4096: 32.2 GFLOPs a token."""
    llama = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
    flops = of_shape(llama, {"language_model": {**RATE, "lora": {"rank": 8, "alpha": 32}}})
    assert flops.of_pack([4096], 0, 4096).total / 4096 == pytest.approx(402e12 / 12473, rel=0.05)


LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=8)
SOME = ModelFlops(encoder=1000, projector=100, linear=60, head=30, attention=((None, 12), (64, 24)))


@given(length=st.integers(0, 60), window=st.none() | st.integers(1, 70))
def test_pairs_are_those_of_a_causal_window(length: int, window: int | None) -> None:
    assert n_pairs(length, window) == sum(
        1 for i in range(length) for j in range(i + 1) if window is None or i - j < window
    )


@given(lengths=LENGTHS, n_images=st.integers(0, 9), n_supervised=st.integers(0, 999))
def test_documents_of_a_pack_take_what_they_take_alone(lengths: list[int], n_images: int, n_supervised: int) -> None:
    pack = SOME.of_pack(lengths, n_images, n_supervised)
    alone = [SOME.of_pack([length], 0, 0).total for length in lengths]
    assert pack.total == sum(alone) + SOME.of_pack([], n_images, n_supervised).total


@given(lengths=LENGTHS)
def test_one_long_document_takes_more_than_its_pieces_by_attention_alone(lengths: list[int]) -> None:
    pieces, whole = SOME.of_pack(lengths, 1, 1), SOME.of_pack([sum(lengths)], 1, 1)
    assert replace(whole, attention=0) == replace(pieces, attention=0)
    assert (whole.attention > pieces.attention) == (len(lengths) > 1)


@given(lengths=LENGTHS, more=st.integers(1, 100))
def test_more_work_takes_more(lengths: list[int], more: int) -> None:
    some = SOME.of_pack(lengths, 1, 1).total
    assert some < SOME.of_pack([lengths[0] + more, *lengths[1:]], 1, 1).total
    assert some < min(SOME.of_pack(lengths, 1 + more, 1).total, SOME.of_pack(lengths, 1, 1 + more).total)


def test_what_trains_takes_more_than_what_is_frozen() -> None:
    counts = [
        flops.of_pack([100], 1, 20).total
        for trainable in (LORA_ALONE, FULL, ALL)
        if (flops := of_shape({"num_hidden_layers": 2}, trainable))
    ]
    assert counts == sorted(set(counts))


def yardstick_of(llava: Llava) -> Yardstick:
    flops = model_flops(llava.model, llava.n_image_tokens)
    return Yardstick(flops, None, llava.n_image_tokens, llava.model.config.image_token_id)


def test_the_work_of_a_pack_is_that_of_its_documents(tmp_path: Path) -> None:
    llava = llava_of(*CASES["full"])
    yardstick = yardstick_of(llava)
    (pack,) = packs_of(llava, tmp_path, 4)
    assert yardstick.flops and pack.n_images
    n_tokens = pack.input_ids.numel()
    n_text_tokens = int((pack.input_ids != llava.model.config.image_token_id).sum())
    flops = yardstick.flops.of_pack(pack.lengths, pack.n_images, pack.n_supervised).total
    assert yardstick.measure(pack) == PackWork(n_tokens, n_text_tokens, 0, pack.n_images, flops)
    singles = [yardstick.measure(one) for one in packs_of(llava, tmp_path, 4, packing=False)]
    assert sum(singles, start=PackWork()) == yardstick.measure(pack)


def test_what_teaches_nothing_is_padding(tmp_path: Path) -> None:
    """The filler of a rank without a sample, and a sample whose image is missing."""
    llava = llava_of(*CASES["full"])
    yardstick = yardstick_of(llava)
    settings = {"batch_size": 2, "seed": None, "n_ranks": 3, "packing": False}
    data = write_data(tmp_path, 6)
    packs = [pack for rank in range(3) for pack in dataset_of(llava, data, rank=rank, **settings)[0].micro_batches]
    filler = next(pack for pack in packs if not pack.n_supervised)
    assert yardstick.measure(filler) == PackWork(n_padding_tokens=2)

    (bare,), (filled,) = (
        dataset_of(llava, data, seed=None, few_sizes=few_sizes)[0].micro_batches for few_sizes in (False, True)
    )
    n_added = filled.input_ids.numel() - bare.input_ids.numel()
    assert n_added > 0
    assert yardstick.measure(filled) == yardstick.measure(bare) + PackWork(n_padding_tokens=n_added)
    assert yardstick.histograms(filled).sample_lengths == yardstick.histograms(bare).sample_lengths

    (good,) = dataset_of(llava, data, seed=None)[0].micro_batches
    (tmp_path / "images" / "0-1.png").unlink()
    (bad,) = dataset_of(llava, data, seed=None)[0].micro_batches
    assert bad.n_images == good.n_images
    lost = good.lengths[1]
    work, before = yardstick.measure(bad), yardstick.measure(good)
    assert (work.n_padding_tokens, work.n_tokens, work.n_images) == (lost, before.n_tokens - lost, good.n_images - 1)
    assert work.n_text_tokens == before.n_text_tokens - (lost - llava.n_image_tokens)
    assert yardstick.flops
    kept = [length for i, length in enumerate(good.lengths) if i != 1]
    assert work.flops == yardstick.flops.of_pack(kept, good.n_images - 1, bad.n_supervised).total


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(2 * before // 4)  # twice as much again
    assert peak_memory_bytes(torch.device("cpu")) >= before + held.nbytes // 2
