from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llava_train.train.histograms import Histograms, counts_in_bins
from llava_train.train.metrics import Yardstick
from tests.tiny import dataset_of, tiny_llava, write_data


@given(most=st.integers(1, 5000), n_bins=st.integers(1, 40), data=st.data())
def test_a_number_is_in_the_bin_whose_borders_enclose_it(most: int, n_bins: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(1, most), max_size=20))
    counts = counts_in_bins(numbers, most, n_bins)
    assert len(counts) == n_bins
    for index, count in enumerate(counts):
        assert count == sum(index * most < number * n_bins <= (index + 1) * most for number in numbers)


def test_histograms_count_the_samples_of_packs_and_no_filler(tmp_path: Path) -> None:
    llava = tiny_llava()
    yardstick = Yardstick(max_sample_tokens=1024, max_tokens=600)
    ranks = [dataset_of(llava, write_data(tmp_path, 7), max_tokens=600, rank=rank, n_ranks=2)[1] for rank in (0, 1)]
    packs = [pack for batch in ranks for pack in batch.micro_batches]
    assert [len(pack.targets) > 0 for pack in packs] == [True, False], "one sample for two ranks"
    [length] = packs[0].lengths
    found = sum(map(yardstick.histograms, packs), start=Histograms())
    assert found.sample_lengths == counts_in_bins([length], 1024, 32)
    assert found.pack_fill == counts_in_bins([length], 600, 10)
    assert sum(found.sample_lengths) == sum(found.pack_fill) == 1
