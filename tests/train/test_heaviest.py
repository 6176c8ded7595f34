from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_train.config import BatchSection
from llava_train.data.packing import plan_packs
from llava_train.model.loss import PackedLoss
from llava_train.train.heaviest import heaviest_pack, imitate, most_images
from tests.tiny import dataset_of, tiny_llava, write_data


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    n_ranks=st.integers(1, 5),
    max_tokens=st.integers(60, 300),
    packing=st.booleans(),
)
def test_no_pack_has_more_tokens_than_the_heaviest_when_samples_are_of_the_greatest_length(
    lengths: list[int], n_ranks: int, max_tokens: int, packing: bool
) -> None:
    batch = BatchSection(size=len(lengths), max_tokens=max_tokens, max_sample_tokens=60, packing=packing)
    heaviest = heaviest_pack(batch, n_ranks, n_image_tokens=1, image_size=28)
    planned = plan_packs([60] * len(lengths), n_ranks, max_tokens, packing=packing)
    assert max(60 * len(pack) for packs in planned for pack in packs) <= heaviest.n_tokens <= max_tokens
    assert max(heaviest.lengths) <= 60


def test_the_heaviest_pack_of_the_docstring() -> None:
    batch = BatchSection(size=4, max_tokens=100, max_sample_tokens=40)
    shape = heaviest_pack(batch, n_ranks=1, n_image_tokens=16, image_size=28)
    assert (shape.lengths, shape.n_images) == ((40, 40, 20), 4)
    assert heaviest_pack(batch, 1, 16, 28, images_a_sample=3).n_images == 5  # 5 * 17 tokens fit, 6 do not


def test_an_imitated_pack_trains_like_a_real_one() -> None:
    llava = tiny_llava()
    batch = BatchSection(size=4, max_tokens=100, max_sample_tokens=40)
    shape = heaviest_pack(batch, 1, llava.n_image_tokens, 28)
    pack = imitate(shape, llava.model.config.image_token_id, torch.device("cpu"))
    loss, losses = PackedLoss(llava.model)(**pack.model_inputs())
    loss.backward()
    assert len(losses) == shape.n_tokens - 1 and losses.isfinite().all()
    assert llava.model.model.multi_modal_projector.linear_1.weight.grad.any()


def test_the_most_images_of_a_sample_are_found(tmp_path: Path) -> None:
    assert most_images(dataset_of(tiny_llava(), write_data(tmp_path, 12)).mixture) == 1
    assert most_images(dataset_of(tiny_llava(), write_data(tmp_path, 3, seed=1, text_only=True)).mixture) == 1
