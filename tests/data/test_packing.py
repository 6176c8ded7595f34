from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_train.data import packing
from llava_train.data.packing import attention_cost_of, plan_packs, sample_cost
from tests.scripts import load_script

MAX_TOKENS = 512
FULL_PACKS = st.builds(
    lambda n_full, others: [MAX_TOKENS] * n_full + others,
    st.integers(0, 300),
    st.lists(st.integers(MAX_TOKENS // 4, MAX_TOKENS), min_size=1, max_size=40),
)
LENGTHS = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60) | FULL_PACKS
CASE = {"lengths": LENGTHS, "n_ranks": st.integers(1, 9), "attention_cost": st.sampled_from([0.0, 1e-4, 1e-2])}


def waited_for(plan: list[list[list[int]]], costs: list[float]) -> float:
    """Sum of the costliest pack of each micro-step."""
    return sum(max(sum(costs[i] for i in pack) for pack in packs) for packs in zip(*plan, strict=True))


def greedy_plan(costs: list[float], lengths: list[int], n_ranks: int) -> list[list[list[int]]]:
    """The costliest sample first, always into the cheapest pack, in the fewest micro-steps in which that fits."""
    n_packs = n_ranks
    while True:
        packs: list[list[int]] = [[] for _ in range(n_packs)]
        loads = [0.0] * n_packs
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            cheapest = loads.index(min(loads))
            packs[cheapest].append(i)
            loads[cheapest] += costs[i]
        if all(sum(lengths[i] for i in pack) <= MAX_TOKENS for pack in packs):
            packs.sort(key=lambda pack: -sum(costs[i] for i in pack))
            return [packs[rank::n_ranks] for rank in range(n_ranks)]
        n_packs += n_ranks


@settings(max_examples=500)
@given(**CASE)
def test_every_sample_once_within_the_limit_and_ranks_in_step(lengths, n_ranks, attention_cost) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost)
    packs = [pack for rank in plan for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= MAX_TOKENS for pack in packs)
    assert len(plan) == n_ranks and len({len(rank) for rank in plan}) == 1


@settings(max_examples=500)
@given(**CASE)
def test_no_pack_costs_more_than_the_mean_pack_plus_the_costliest_sample(lengths, n_ranks, attention_cost) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost)
    costs = [sample_cost(n, attention_cost) for n in lengths]
    pack_costs = [sum(costs[i] for i in pack) for rank in plan for pack in rank]
    mean = sum(pack_costs) / len(pack_costs)
    assert max(pack_costs) <= mean + max(costs) * (1 + 1e-9)


@settings(max_examples=500)
@given(**CASE)
def test_the_plan_is_a_function_of_its_arguments(lengths, n_ranks, attention_cost) -> None:
    arguments = (lengths, n_ranks, MAX_TOKENS, attention_cost)
    assert plan_packs(*arguments) == plan_packs(*arguments)
    assert all(pack == sorted(pack) for rank in plan_packs(*arguments) for pack in rank)


@settings(max_examples=500)
@given(**CASE)
def test_without_packing_each_sample_has_a_pack_of_its_own(lengths, n_ranks, attention_cost) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost, packing=False)
    assert all(len(pack) <= 1 for rank in plan for pack in rank)
    assert {len(rank) for rank in plan} == {math.ceil(len(lengths) / n_ranks)}


@settings(max_examples=500)
@given(**CASE)
def test_packing_takes_as_few_micro_steps_as_fit_and_never_more_than_one_a_sample(
    lengths, n_ranks, attention_cost
) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost)
    assert math.ceil(sum(lengths) / (n_ranks * MAX_TOKENS)) <= len(plan[0]) <= math.ceil(len(lengths) / n_ranks)
    if sum(lengths) <= MAX_TOKENS:
        assert len(plan[0]) == 1


@settings(max_examples=500)
@given(**CASE)
def test_every_rank_has_work_in_every_micro_step_when_samples_suffice(lengths, n_ranks, attention_cost) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost)
    n_packs = n_ranks * len(plan[0])
    n_empty = sum(not pack for rank in plan for pack in rank)
    assert n_empty == max(0, n_packs - len(lengths))


@settings(max_examples=500)
@given(lengths=st.lists(st.integers(1, 40), min_size=32, max_size=128), n_ranks=st.integers(1, 4))
def test_short_samples_need_at_most_one_micro_step_more_than_their_tokens(lengths, n_ranks) -> None:
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS)
    assert len(plan[0]) <= math.ceil(sum(lengths) / (n_ranks * MAX_TOKENS)) + 1


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("max_tokens", [8192, 16384])
@pytest.mark.parametrize(("batch", "n_ranks"), [(64, 8), (128, 8), (128, 16), (512, 64), (1024, 128)])
def test_ranks_with_8_samples_or_more_wait_for_each_other_less_than_3_percent(
    batch: int, n_ranks: int, max_tokens: int, seed: int
) -> None:
    lengths = [sample.n_tokens for sample in load_script("benchmarks/mix665k.py").draw_samples(batch, seed)]
    attention_cost = attention_cost_of(4096)
    costs = [sample_cost(n, attention_cost) for n in lengths]
    plan = plan_packs(lengths, n_ranks, max_tokens, attention_cost)
    assert sum(costs) >= 0.97 * n_ranks * waited_for(plan, costs)


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(64, MAX_TOKENS), min_size=4, max_size=48),
    n_ranks=st.integers(1, 8),
    attention_cost=st.sampled_from([0.0, 1e-4]),
)
def test_no_more_micro_steps_than_greedy_packs_and_in_as_many_hardly_longer_waits(
    lengths, n_ranks, attention_cost
) -> None:
    costs = [sample_cost(n, attention_cost) for n in lengths]
    plan, greedy = plan_packs(lengths, n_ranks, MAX_TOKENS, attention_cost), greedy_plan(costs, lengths, n_ranks)
    assert len(plan[0]) <= len(greedy[0])
    if len(plan[0]) == len(greedy[0]):
        assert waited_for(plan, costs) <= 1.05 * waited_for(greedy, costs)


@pytest.mark.parametrize("shortest", [0.51, 0.34, 0.26])
def test_samples_that_share_no_pack_are_planned_in_few_tries(shortest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by trying each number of micro-steps from the fewest that hold the tokens on: these are hundreds."""
    lengths = [int(2048 * (shortest + (1 - shortest) * i / 8190)) for i in range(8191)]
    tries = Mock(wraps=packing._greedy)
    monkeypatch.setattr(packing, "_greedy", tries)
    plan = plan_packs(lengths, 8, 2048)
    assert 0 < tries.call_count <= 5
    assert len(plan[0]) <= 1024


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(64, MAX_TOKENS), min_size=40, max_size=120), n_ranks=st.integers(1, 6))
def test_samples_that_fill_packs_badly_need_few_more_micro_steps_than_their_tokens(lengths, n_ranks) -> None:
    """Against the tokens, and the samples of which no pack holds two: half as many again, as first fit decreasing."""
    plan = plan_packs(lengths, n_ranks, MAX_TOKENS)
    over_half = sum(n > MAX_TOKENS // 2 for n in lengths)
    fewest = max(math.ceil(sum(lengths) / MAX_TOKENS), over_half)
    assert len(plan[0]) <= math.ceil((fewest * 1.5 + 1) / n_ranks)


def test_the_example_of_the_docstring() -> None:
    assert plan_packs([5, 4, 3, 3], n_ranks=2, max_tokens=8) == [[[0, 3]], [[1, 2]]]


def test_ranks_without_a_sample_get_an_empty_pack() -> None:
    assert plan_packs([3], n_ranks=3, max_tokens=8) == [[[0]], [[]], [[]]]


def test_a_sample_over_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit in a pack of 8"):
        plan_packs([3, 9], n_ranks=1, max_tokens=8)


def test_a_step_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="without samples"):
        plan_packs([], n_ranks=1, max_tokens=8)
