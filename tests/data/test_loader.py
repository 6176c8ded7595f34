from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_train.data.chat import IGNORED, EncodedSample
from llava_train.data.formats import parse_record
from llava_train.data.loader import first_pictures, pack_documents, read_steps
from llava_train.data.pictures import PictureFolder, Pictures
from llava_train.onednn import next_size
from tests.tiny import dataset_of, tiny_llava, write_data


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def document(ids: list[int], supervised: list[int]) -> EncodedSample:
    labels = [i if position in supervised else IGNORED for position, i in enumerate(ids)]
    return EncodedSample(np.array(ids), np.array(labels), n_images=0)


def documents_of(batch) -> list[tuple[int, ...]]:
    return [tuple(document.tolist()) for document in batch.input_ids[0].split(batch.lengths)]


def test_the_example_of_the_docstring() -> None:
    filler = document([9, 9], [])
    batch = pack_documents(
        [document([5, 6, 7], [1, 2]), document([3, 4], [1])], [], torch.zeros(3, 2, 2), filler, [0, 1]
    )
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.max_seqlen, batch.n_supervised) == (3, 3)
    assert batch.predictors.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 4]
    assert (batch.n_images, batch.pixel_values.shape) == (0, (1, 3, 2, 2))


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("packing", [True, False])
def test_the_ranks_of_a_step_share_the_same_samples_whatever_their_number(
    llava, tmp_path: Path, n_ranks: int, packing: bool
) -> None:
    data = write_data(tmp_path, 14)
    alone = dataset_of(llava, data)
    ranks = [dataset_of(llava, data, rank=rank, n_ranks=n_ranks, packing=packing) for rank in range(n_ranks)]
    for step in range(4):
        (expected,) = alone[step].micro_batches
        batches = [rank[step] for rank in ranks]
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        filler = tuple(ranks[0]._filler().input_ids.tolist())
        found = [d for batch in batches for micro in batch.micro_batches for d in documents_of(micro) if d != filler]
        assert sorted(found) == sorted(documents_of(expected))
        assert sum(batch.n_supervised for batch in batches) == expected.n_supervised
        assert sum(batch.n_images for batch in batches) == expected.n_images


@pytest.mark.parametrize("packing", [True, False])
def test_images_stand_in_a_pack_in_the_order_of_their_documents(llava, tmp_path: Path, packing: bool) -> None:
    data = write_data(tmp_path, 12)
    alone = dataset_of(llava, data, seed=None, batch_size=1)
    pixels = {}
    for i in range(12):
        (single,) = alone[i].micro_batches
        pixels[documents_of(single)[0]] = single.pixel_values[: single.n_images]
    steps = dataset_of(llava, data, max_tokens=1024, packing=packing)
    for batch in (micro for step in range(2) for micro in steps[step].micro_batches):
        expected = torch.cat([pixels[document] for document in documents_of(batch)])
        assert torch.equal(batch.pixel_values[: batch.n_images], expected)
        n_image_tokens = int((batch.input_ids == llava.model.config.image_token_id).sum())
        assert n_image_tokens == batch.n_images * llava.n_image_tokens


def test_an_epoch_trains_on_every_sample_once(llava, tmp_path: Path) -> None:
    data = write_data(tmp_path, 14)
    dataset = dataset_of(llava, data)
    found = [d for step in range(3) for micro in dataset[step].micro_batches for d in documents_of(micro)]
    whole = dataset_of(llava, data, seed=None, batch_size=14)[0]
    assert sorted(found) == sorted(d for micro in whole.micro_batches for d in documents_of(micro))
    assert [sum(dataset[step].n_samples) for step in range(3)] == [6, 6, 2]


def test_borders_positions_and_targets_agree(llava, tmp_path: Path) -> None:
    for batch in dataset_of(llava, write_data(tmp_path, 12), max_tokens=1024)[0].micro_batches:
        ids, labels, positions = batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.position_ids[0].tolist()
        borders = batch.cu_seqlens.tolist()
        assert borders == [0, *np.cumsum(batch.lengths)]
        assert borders[-1] == len(ids) == len(labels) <= 1024
        expected = []
        for start, end in zip(borders, borders[1:], strict=False):
            assert positions[start:end] == list(range(end - start))
            expected += [(i - 1, ids[i]) for i in range(start + 1, end) if labels[i] != IGNORED]
        assert list(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True)) == expected
        assert batch.n_supervised == len(expected) > 0


def test_images_that_truncation_leaves_out_are_not_decoded(llava, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
    turns += [{"from": "human", "value": "<image> c"}, {"from": "gpt", "value": "d"}]
    Image.new("RGB", (30, 30)).save(tmp_path / "first.png")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": ["first.png", "missing.png"], "conversations": turns}]))
    dataset = dataset_of(llava, data, batch_size=1)
    pictures = Pictures(PictureFolder(tmp_path))
    first_turn = dataset.encoder.encode(parse_record({"image": "x", "conversations": turns[:2]}, pictures, "")).n_tokens
    dataset.encoder.max_tokens, dataset.encoder.over_long = first_turn + 4, "truncate"
    batch = dataset[0]
    assert (batch.n_images, batch.bad_samples, batch.n_tokens <= first_turn + 4) == (1, (), True)
    assert batch.n_supervised == len("b") + 2  # the space before it and </s>


def test_an_over_long_sample_is_reported_by_every_rank_as_over_long(llava, tmp_path: Path) -> None:
    data = write_data(tmp_path, 6)
    lengths = [dataset_of(llava, data, seed=None, batch_size=1)[i].n_tokens for i in range(6)]
    for rank in (0, 1):
        dataset = dataset_of(llava, data, seed=None, rank=rank, n_ranks=2)
        dataset.encoder.max_tokens = max(lengths) - 1
        (bad,) = dataset[0].bad_samples
        assert (bad.index, bad.over_long, bad.on_every_rank) == (lengths.index(max(lengths)), True, True)
        assert f"{max(lengths)} tokens, more than batch.max_sample_tokens ({max(lengths) - 1})" in bad.reason


def test_a_rank_without_a_sample_gets_a_filler_that_teaches_nothing(llava, tmp_path: Path) -> None:
    (batch,) = dataset_of(llava, write_data(tmp_path, 1), rank=1, n_ranks=2)[0].micro_batches
    assert (batch.n_supervised, batch.n_images, batch.lengths) == (0, 0, (2,))


def test_a_corrupt_image_keeps_its_place_with_zero_weight(llava, tmp_path: Path) -> None:
    data = write_data(tmp_path, 6)
    whole = dataset_of(llava, data, seed=None)[0]
    (tmp_path / "images/0-1.png").write_bytes(b"broken")
    ranks = [dataset_of(llava, data, seed=None, rank=rank, n_ranks=2)[0] for rank in (0, 1)]
    bad = [bad for rank in ranks for bad in rank.bad_samples]
    assert [(b.id, b.index, b.on_every_rank, b.over_long) for b in bad] == [("sample-1", 1, False, False)]
    assert "not a readable image" in bad[0].reason
    assert sum(rank.n_tokens for rank in ranks) == whole.n_tokens
    assert sum(rank.n_images for rank in ranks) == whole.n_images
    assert all(micro.pixel_values.isfinite().all() for rank in ranks for micro in rank.micro_batches)
    own = dataset_of(llava, data, seed=None, batch_size=1)[1]
    assert own.n_supervised == 0
    without = sum(dataset_of(llava, data, seed=None, batch_size=1)[i].n_supervised for i in (0, 2, 3, 4, 5))
    assert sum(rank.n_supervised for rank in ranks) == without


def test_a_record_that_cannot_be_parsed_is_left_out_by_every_rank(llava, tmp_path: Path) -> None:
    data = write_data(tmp_path, 6)
    rows = json.loads(data.read_text())
    rows[2]["conversations"] = []
    data.write_text(json.dumps(rows))
    ranks = [dataset_of(llava, data, seed=None, rank=rank, n_ranks=2)[0] for rank in (0, 1)]
    for rank in ranks:
        assert [(bad.id, bad.on_every_rank) for bad in rank.bad_samples] == [("sample-2", True)]
        assert rank.n_samples == (5,)
    assert sum(len(d) for rank in ranks for micro in rank.micro_batches for d in documents_of(micro)) == sum(
        dataset_of(llava, data, seed=None, batch_size=1)[i].n_tokens for i in (0, 1, 3, 4, 5)
    )


def test_a_step_of_bad_samples_alone_still_has_a_micro_step(llava, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "a"}, {"id": "b"}]))
    batch = dataset_of(llava, data)[0]
    assert (len(batch.micro_batches), batch.n_supervised, len(batch.bad_samples)) == (1, 0, 2)
    other = dataset_of(llava, data, rank=1, n_ranks=2)[0]
    assert (len(other.micro_batches), other.n_samples) == (1, (0,))


def test_workers_change_nothing(llava, tmp_path: Path) -> None:
    dataset = dataset_of(llava, write_data(tmp_path, 20), max_tokens=1024)
    here, there = (list(read_steps(dataset, range(1, 6), n_workers=n, pin_memory=False)) for n in (0, 2))
    assert [batch.step for batch in here] == [batch.step for batch in there] == [1, 2, 3, 4, 5]
    for a, b in zip(here, there, strict=True):
        for one, other in zip(a.micro_batches, b.micro_batches, strict=True):
            assert one.lengths == other.lengths
            tensors = [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_group_while_workers_start_ends_none(llava, tmp_path: Path, number: int) -> None:
    dataset = dataset_of(llava, write_data(tmp_path, 8))
    signal_children = True
    os.register_at_fork(after_in_child=lambda: signal_children and os.kill(os.getpid(), number))
    try:
        assert len(list(read_steps(dataset, range(1, 4), n_workers=2, pin_memory=False))) == 3
    finally:
        signal_children = False
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_no_padding_is_computed(llava, tmp_path: Path) -> None:
    dataset = dataset_of(llava, write_data(tmp_path, 12))
    encoded = [dataset.encoder.encode(dataset.mixture[i]).n_tokens for i in dataset._indices(0)]
    assert dataset[0].n_tokens == sum(encoded)


@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=20), room=st.integers(0, 300))
def test_a_pack_is_filled_up_to_one_of_few_sizes_with_documents_that_teach_nothing(
    lengths: list[int], room: int
) -> None:
    documents = [document([5] * n, [n - 1]) for n in lengths]
    most, blank, filler = sum(lengths) + room, torch.zeros(3, 2, 2), document([9, 8], [])
    bare, filled = (
        pack_documents(documents, [], blank, filler, [1] * len(lengths), fill_up_to) for fill_up_to in (None, most)
    )
    n_tokens = next_size(sum(lengths), most)
    assert filled.input_ids.shape == filled.labels.shape == filled.position_ids.shape == (1, n_tokens)
    assert n_tokens <= most
    assert filled.lengths[: len(lengths)] == bare.lengths
    assert filled.max_seqlen == bare.max_seqlen, "no position that the documents themselves do not have"
    assert all(filled.lengths)
    assert filled.cu_seqlens.tolist() == [0, *np.cumsum(filled.lengths)]
    assert filled.position_ids[0].tolist() == [i for n in filled.lengths for i in range(n)]
    n_real = sum(lengths)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(filled, name)[:, :n_real], getattr(bare, name))
    assert (filled.labels[0, n_real:] == IGNORED).all()
    for name in ("predictors", "targets", "sources", "pixel_values"):
        assert torch.equal(getattr(filled, name), getattr(bare, name))
    assert filled.n_images == 0


def test_steps_have_few_sizes_where_that_is_asked_for(llava, tmp_path: Path) -> None:
    data = write_data(tmp_path, 12)
    bare, filled = (dataset_of(llava, data, few_sizes=few_sizes) for few_sizes in (False, True))
    for step in range(2):
        (plain,), (pack,) = bare[step].micro_batches, filled[step].micro_batches
        assert pack.input_ids.numel() == next_size(plain.input_ids.numel(), 2048) > plain.input_ids.numel()
        assert torch.equal(pack.targets, plain.targets)
    tight = dataset_of(llava, data, few_sizes=True, max_tokens=plain.input_ids.numel() + 1)
    assert tight[1].micro_batches[0].input_ids.numel() == tight.max_tokens


@pytest.mark.parametrize(("wanted", "n_steps", "least", "most"), [(3, 9, 3, 8), (1000, 2, 8, 8), (5, 0, 0, 0)])
def test_first_pictures_are_as_many_as_wanted_or_those_of_the_first_steps(
    llava, tmp_path: Path, wanted: int, n_steps: int, least: int, most: int
) -> None:
    """12 samples in 2 steps an epoch, 8 of them with a picture."""
    dataset = dataset_of(llava, write_data(tmp_path))
    pictures = first_pictures(dataset, wanted, n_steps)
    assert least <= sum(map(len, pictures)) <= most
    assert all(pixels.shape[1:] == (3, 28, 28) for pixels in pictures)


def test_first_pictures_of_texts_are_none(llava, tmp_path: Path) -> None:
    assert first_pictures(dataset_of(llava, write_data(tmp_path, text_only=True)), 3, 4) == []
