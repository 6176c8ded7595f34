"""Exact-batch packing: the samples of one optimizer step -> packs for each rank and micro-step.

Pure functions over lengths: no torch, no files, no processes. A sample never leaves its step, so packing is a
speed knob only. The packs are filled greedily, the costliest sample first, always into the cheapest pack
(longest processing time first; Graham 1969), with the fewest micro-steps for which no pack overflows. As
every sample goes to the pack that is cheapest at that moment, no pack costs more than the mean pack plus
the costliest sample: the stated bound on imbalance.

    plan_packs([5, 4, 3, 3], n_ranks=2, max_tokens=8) == [[[0, 3]], [[1, 2]]]
    #                                     rank 0, micro-step 0: samples 0 and 3;  rank 1: samples 1 and 2
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Pack = list[int]


def sample_cost(n_tokens: int, attention_cost: float = 0.0) -> float:
    """Work for a sample, in tokens: linear layers, plus attention that grows with the square of its length.

    `attention_cost` is about 1 / (6 * hidden size) for a transformer: 12 h^2 multiplications a token and layer
    in the linear layers, 2 h a token pair in attention.
    """
    return n_tokens * (1.0 + attention_cost * n_tokens)


def attention_cost_of(hidden_size: int) -> float:
    """`attention_cost` of a transformer, see `sample_cost`."""
    return 1 / (6 * hidden_size)


def plan_packs(
    lengths: Sequence[int],
    n_ranks: int,
    max_tokens: int,
    attention_cost: float = 0.0,
    packing: bool = True,
) -> list[list[Pack]]:
    """Packs of the samples of a step.

    Args:
        lengths: tokens of each sample, at most `max_tokens` each.
        n_ranks: number of ranks.
        max_tokens: most tokens in a pack.
        attention_cost: see `sample_cost`.
        packing: False puts each sample in a pack of its own.

    Returns:
        `plan[rank][micro_step]` is the pack of that rank and micro-step: indices into `lengths`, ascending.
        Every rank has the same number of micro-steps; a pack is empty where samples are too few.
        Micro-steps go from costly to cheap, and the packs of one micro-step cost about the same.

    Raises:
        ValueError: no samples, or one longer than `max_tokens`.
    """
    if not lengths:
        raise ValueError("a step without samples")
    if max(lengths) > max_tokens:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit in a pack of {max_tokens}")
    costs = [sample_cost(n_tokens, attention_cost) for n_tokens in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    most_micro_steps = -(-len(lengths) // n_ranks)
    fewest_micro_steps = -(-sum(lengths) // (n_ranks * max_tokens)) if packing else most_micro_steps
    for n_micro_steps in range(fewest_micro_steps, most_micro_steps + 1):
        packs = _fill(order, lengths, costs, n_ranks * n_micro_steps, max_tokens)
        if packs is not None:
            return _assign(packs, costs, n_ranks)
    raise AssertionError("one sample a pack always fits")


def _fill(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], n_packs: int, max_tokens: int
) -> list[Pack] | None:
    """Puts each sample into the cheapest pack; None when one overflows."""
    packs: list[Pack] = [[] for _ in range(n_packs)]
    n_tokens = [0] * n_packs
    cheapest = [(0.0, number) for number in range(n_packs)]
    for i in order:
        cost, number = cheapest[0]
        n_tokens[number] += lengths[i]
        if n_tokens[number] > max_tokens:
            return None
        packs[number].append(i)
        heapq.heapreplace(cheapest, (cost + costs[i], number))
    return packs


def _assign(packs: list[Pack], costs: Sequence[float], n_ranks: int) -> list[list[Pack]]:
    """Deals packs of like cost to the ranks of a micro-step, changing direction each time."""
    by_cost = sorted(packs, key=lambda pack: (-sum(costs[i] for i in pack), pack))
    plan: list[list[Pack]] = [[] for _ in range(n_ranks)]
    for micro_step, start in enumerate(range(0, len(by_cost), n_ranks)):
        dealt = by_cost[start : start + n_ranks]
        ranks = range(n_ranks) if micro_step % 2 == 0 else reversed(range(n_ranks))
        for rank, pack in zip(ranks, dealt, strict=True):
            plan[rank].append(sorted(pack))
    return plan
