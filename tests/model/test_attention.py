"""Invariant 3: packed documents don't see each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_train.config import RandomLanguageModel
from llava_train.data.loader import PackedBatch
from llava_train.model.attention import PACKED, attend_by_document, varlen_kernel
from llava_train.model.loss import PackedLoss
from tests.tiny import LANGUAGE_MODEL, dataset_of, model_section, tiny_llava, write_data

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "a window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}


def inputs_of(batch: PackedBatch) -> dict:
    names = ("input_ids", "position_ids", "pixel_values", "n_images", "cu_seqlens", "lengths")
    return {name: getattr(batch, name) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_a_pack_gives_each_document_the_hidden_states_it_has_alone(
    family: str, key_value_heads: int, tmp_path: Path
) -> None:
    config = {**LANGUAGE_MODEL, "model_type": family, "num_key_value_heads": key_value_heads, **FAMILIES[family]}
    llava = tiny_llava(model_section(language_model=RandomLanguageModel(config=config)))
    data = write_data(tmp_path, 5)
    (pack,) = dataset_of(llava, data, seed=None, batch_size=5)[0].micro_batches
    assert min(pack.lengths) > 16, "each document is longer than the window"
    packed = PackedLoss(llava.model).hidden_states(**inputs_of(pack))[0]
    alone = dataset_of(llava, data, seed=None, batch_size=1)
    llava.model.model.language_model.set_attn_implementation("eager")
    for i, hidden in enumerate(packed.split(pack.lengths)):
        (single,) = alone[i].micro_batches
        expected = llava.model.model(
            input_ids=single.input_ids, pixel_values=single.pixel_values if single.n_images else None
        ).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_changing_one_document_leaves_the_others_alone(tmp_path: Path) -> None:
    llava = tiny_llava()
    (pack,) = dataset_of(llava, write_data(tmp_path, 4), seed=None, batch_size=4)[0].micro_batches
    run = PackedLoss(llava.model)
    before = run.hidden_states(**inputs_of(pack))[0].split(pack.lengths)
    first = pack.lengths[0]
    pack.input_ids[0, 5:first] = (pack.input_ids[0, 5:first] + 1) % 200
    after = run.hidden_states(**inputs_of(pack))[0].split(pack.lengths)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_gradients_of_a_pack_stay_within_its_documents() -> None:
    torch.manual_seed(0)
    lengths = (3, 5, 2)
    query, key, value = (torch.randn(1, heads, 10, 8, requires_grad=True) for heads in (4, 2, 2))
    output = attend_by_document(query, key, value, lengths, None)
    output[0, 3:8].sum().backward()
    for tensor in (key, value):
        reached = tensor.grad.abs().sum(dim=(0, 1, 3)) > 0
        assert reached[3:8].any() and not reached[:3].any() and not reached[8:].any()


def test_the_language_model_of_a_built_llava_uses_packed_attention() -> None:
    llava = tiny_llava()
    assert llava.model.model.language_model.config._attn_implementation == PACKED
    assert llava.model.model.vision_tower.config._attn_implementation != PACKED


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key_value_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 20, 500])
def test_the_cuda_kernel_equals_attention_document_by_document(key_value_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    lengths = (37, 129, 1, 64)
    borders = torch.tensor([0, 37, 166, 167, 231], dtype=torch.int32, device="cuda")
    shapes = [(1, heads, sum(lengths), 64) for heads in (8, key_value_heads, key_value_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    twins = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours = varlen_kernel()(*inputs, borders, max(lengths), 0.125, window)
    theirs = attend_by_document(*twins, lengths, 0.125, window)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for ours_in, theirs_in in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=5e-2, atol=5e-2)
