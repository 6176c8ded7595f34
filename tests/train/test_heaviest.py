from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.config import BatchSection
from llava_train.data.lengths import Longest, SampleLengths, longest_of
from llava_train.data.packing import plan_packs
from llava_train.model.loss import PackedLoss
from llava_train.train.heaviest import heaviest_pack, imitate
from tests.tiny import tiny_llava

N_IMAGE_TOKENS = 4


@given(data=st.data())
@settings(max_examples=300)
def test_no_pack_is_heavier_than_the_heaviest(data: st.DataObject) -> None:
    """Of a step of any samples, measured or not; with the strongest effect of attention on what a pack costs."""
    longest_sample = data.draw(st.integers(N_IMAGE_TOKENS + 1, 80))
    samples = data.draw(
        st.lists(st.one_of(st.integers(2, longest_sample), st.just(longest_sample)), min_size=1, max_size=40)
    )
    n_images = [data.draw(st.integers(0, (n_tokens - 1) // N_IMAGE_TOKENS)) for n_tokens in samples]
    n_ranks, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    max_tokens = data.draw(st.integers(longest_sample, 400))
    attention_cost, packing = data.draw(st.sampled_from([0.0, 1e-3, 0.1])), data.draw(st.booleans())
    batch = BatchSection(size=size, max_tokens=max_tokens, max_sample_tokens=longest_sample, packing=packing)
    longest = longest_of(SampleLengths(np.array(samples), np.array(samples), np.array(n_images)), size)
    chosen = data.draw(st.permutations(range(len(samples))))[:size]
    lengths = [samples[number] for number in chosen]
    planned = plan_packs(lengths, n_ranks, max_tokens, attention_cost, packing)
    packs = [[chosen[number] for number in pack] for of_rank in planned for pack in of_rank]
    measured, unmeasured = (
        heaviest_pack(batch, n_ranks, N_IMAGE_TOKENS, 28, attention_cost, m) for m in (longest, None)
    )
    for heaviest in (measured, unmeasured):
        assert max(sum(samples[number] for number in pack) for pack in packs) <= heaviest.n_tokens <= max_tokens
        assert max(sum(n_images[number] for number in pack) for pack in packs) <= heaviest.n_images
        assert heaviest.n_images * N_IMAGE_TOKENS <= heaviest.n_tokens
        assert min(heaviest.lengths) > 0 and max(heaviest.lengths) <= longest_sample
    assert measured.n_tokens <= unmeasured.n_tokens and measured.n_images <= unmeasured.n_images


def test_a_rank_may_have_more_tokens_than_its_share_of_the_longest_samples() -> None:
    """Attention makes long samples dear: seven ranks have one each, and the eighth all eight short ones."""
    samples, n_ranks, attention_cost = [60] * 7 + [21] * 8, 8, 1.0
    batch = BatchSection(size=15, max_tokens=1000, max_sample_tokens=60)
    planned = plan_packs(samples, n_ranks, batch.max_tokens, attention_cost)
    heaviest = max(sum(samples[number] for number in pack) for of_rank in planned for pack in of_rank)
    assert heaviest == 8 * 21 > 2 * 60
    assert heaviest <= heaviest_pack(batch, n_ranks, 16, 28, attention_cost).n_tokens


def test_the_heaviest_pack_of_the_docstring() -> None:
    batch = BatchSection(size=4, max_tokens=100, max_sample_tokens=40)
    shape = heaviest_pack(batch, n_ranks=1, n_image_tokens=16, image_size=28)
    assert (shape.lengths, shape.n_images) == ((40, 40, 20), 6)  # 3 * (2 * 16 + 1) tokens fit
    shape = heaviest_pack(batch, 1, 16, 28, longest=Longest((20,) * 4, (1,) * 4))
    assert (shape.lengths, shape.n_images) == ((20,) * 4, 4)


def test_the_heaviest_pack_of_small_data_is_that_of_its_longest_samples() -> None:
    """12 samples of at most 145 tokens make 1,740, whatever the keys allow."""
    batch = BatchSection(size=12, max_tokens=4096, max_sample_tokens=512)
    longest = Longest((145,) * 12, (1,) * 12)
    of_ranks = [heaviest_pack(batch, n_ranks, 16, 56, 1 / (6 * 576), longest) for n_ranks in (1, 2, 12, 16)]
    assert [shape.n_tokens for shape in of_ranks] == [1740, pytest.approx(6 * 145, rel=0.03), 145, 145]
    assert [shape.n_images for shape in of_ranks] == [12, 11, 1, 1]
    alone = BatchSection(size=12, max_tokens=4096, max_sample_tokens=512, packing=False)
    assert heaviest_pack(alone, 1, 16, 56, longest=longest).lengths == (145,)


def test_an_imitated_pack_trains_like_a_real_one() -> None:
    llava = tiny_llava()
    batch = BatchSection(size=4, max_tokens=100, max_sample_tokens=40)
    shape = heaviest_pack(batch, 1, llava.n_image_tokens, 28)
    pack = imitate(shape, llava.model.config.image_token_id, torch.device("cpu"))
    loss, losses = PackedLoss(llava.model)(**pack.model_inputs())
    loss.backward()
    assert len(losses) == shape.n_tokens - 1 and losses.isfinite().all()
    assert llava.model.model.multi_modal_projector.linear_1.weight.grad.any()
