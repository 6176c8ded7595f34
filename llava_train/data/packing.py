"""Exact-batch packing: the samples of one optimizer step -> packs for each rank and micro-step.

Pure functions over lengths: no torch, no files, no processes. A sample never leaves its step, so packing is a
speed knob only. All ranks wait for the costliest pack of a micro-step, so its packs shall cost the same:

1. The packs are filled greedily, the costliest sample first, always into the cheapest pack (longest processing time
   first; Graham 1969). Costly packs then swap samples with cheap ones, until all are within a percent of the mean.
2. Where that does not fit in `max_tokens`, or a sample costs more than the mean pack, packs are filled one by one,
   always with the longest sample that still fits (first fit decreasing). The costliest of them make up the first
   micro-steps, and as many of the last ones as allow it are packed anew as in 1. Where ranks wait less with packs
   filled greedily, or these need fewer micro-steps, it is those.

As every sample goes to the pack that is cheapest at that moment, no pack costs more than the mean pack plus
the costliest sample: the stated bound on imbalance. Plans that don't keep it are not used.
`benchmarks/packing_scale.py` measures balance and time.

    plan_packs([5, 4, 3, 3], n_ranks=2, max_tokens=8) == [[[0, 3]], [[1, 2]]]
    #                                     rank 0, micro-step 0: samples 0 and 3;  rank 1: samples 1 and 2
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Pack = list[int]

_BALANCED = 1.01  # costliest pack / mean pack below which swaps don't pay
_MOST_SWAPS = 5  # of a pack; most are balanced after 3
_FULL = 0.98  # share of `max_tokens` up to which packs of equal cost are tried for
_MOST_HELD = 8  # samples in a pack, in a bound on the packs: of smaller ones, the tokens tell as much
_MOST_SAMPLES_TO_SWAP = 32  # in a pack: with more, no swap is needed, and each would take much memory


def sample_cost(n_tokens: int, attention_cost: float = 0.0) -> float:
    """Work for a sample, in tokens: linear layers, plus attention that grows with the square of its length.

    `attention_cost` is about 1 / (6 * hidden size) for a transformer: 12 h^2 multiplications a token and layer
    in the linear layers, 2 h a token pair in attention.
    """
    return n_tokens * (1.0 + attention_cost * n_tokens)


def attention_cost_of(hidden_size: int) -> float:
    """`attention_cost` of a transformer, see `sample_cost`."""
    return 1 / (6 * hidden_size)


@dataclass(frozen=True)
class _Step:
    """The samples of a step; indices below are into these arrays, the costliest sample is number 0."""

    lengths: np.ndarray  # int64 [n]
    costs: np.ndarray  # float64 [n], descending
    max_tokens: int

    def sums(self, packs: Sequence[Pack], values: np.ndarray) -> np.ndarray:
        """Sum of the values of each pack's samples."""
        owners = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        samples = [i for pack in packs for i in pack]
        return np.bincount(owners, weights=values[samples], minlength=len(packs))


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
    n_tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-n_tokens, kind="stable")
    n_tokens = n_tokens[order]
    step = _Step(n_tokens, n_tokens * (1.0 + attention_cost * n_tokens), max_tokens)
    packs = _pack(step, n_ranks) if packing else _padded([[i] for i in range(len(lengths))], n_ranks)
    return _deal(packs, n_ranks, order.tolist())


def _pack(step: _Step, n_ranks: int) -> list[Pack]:
    """A multiple of `n_ranks` packs, as `_evened` leaves them."""
    samples, mean_of_one = range(len(step.costs)), float(step.costs.sum()) / n_ranks
    fewest = -(-_fewest_packs(step) // n_ranks)
    too_full = step.lengths.sum() > _FULL * n_ranks * fewest * step.max_tokens
    if fewest == 1 or (not too_full and step.costs[0] <= mean_of_one / fewest):
        balanced = _balanced(step, samples, n_ranks * fewest)
        if balanced is not None:
            return _evened(step, balanced, n_ranks)
        fewest += 1
    full = _by_cost(step, _padded(_full(step), n_ranks))
    n_micro_steps, plans = len(full) // n_ranks, []
    while n_micro_steps > fewest and _fits(step, _greedy(step, samples, n_ranks * (n_micro_steps - 1))):
        n_micro_steps -= 1
    if n_ranks * n_micro_steps == len(full):
        packs = _evened(step, _last_balanced(step, full, n_ranks), n_ranks)
        if all(packs) and step.sums(packs, step.costs).max() <= mean_of_one / n_micro_steps + step.costs[0]:
            plans.append(packs)
    if plans and _waited_for(step, plans[0], n_ranks) <= _BALANCED * mean_of_one:
        return plans[0]
    packs = _greedy(step, samples, n_ranks * n_micro_steps)
    while not plans and not _fits(step, packs):  # ends at the latest with a sample a pack
        n_micro_steps += 1
        packs = _greedy(step, samples, n_ranks * n_micro_steps)
    if _fits(step, packs):
        plans.append(_evened(step, packs, n_ranks))
    return min(plans, key=lambda plan: _waited_for(step, plan, n_ranks))


def _fewest_packs(step: _Step) -> int:
    """Packs needed at the least, for all tokens, and for the samples of which no pack holds more than 1, 2, 3, ..."""
    held = np.arange(1, _MOST_HELD + 1)
    n_samples = np.searchsorted(-step.lengths, -(step.max_tokens // (held + 1)))
    return int(max(-(-step.lengths.sum() // step.max_tokens), (-(-n_samples // held)).max()))


def _waited_for(step: _Step, packs: list[Pack], n_ranks: int) -> float:
    """Sum of the costliest pack of each micro-step."""
    return float(np.sort(step.sums(packs, step.costs))[::-1][::n_ranks].sum())


def _balanced(step: _Step, samples: Sequence[int], n_packs: int) -> list[Pack] | None:
    """Packs of about the same cost, from samples in descending order; None when one overflows."""
    packs = _swapped(step, _greedy(step, samples, n_packs), n_packs)
    return packs if _fits(step, packs) else None


def _greedy(step: _Step, samples: Sequence[int], n_packs: int) -> list[Pack]:
    """Each of the samples, in descending order, in the cheapest pack; whether they fit is not asked."""
    packs: list[Pack] = [[] for _ in range(n_packs)]
    cheapest = [(0.0, number) for number in range(n_packs)]
    for i, cost in zip(samples, step.costs[samples].tolist(), strict=True):
        so_far, number = cheapest[0]
        packs[number].append(i)
        heapq.heapreplace(cheapest, (so_far + cost, number))
    return packs


def _fits(step: _Step, packs: list[Pack]) -> bool:
    return bool(step.sums(packs, step.lengths).max() <= step.max_tokens)


def _last_balanced(step: _Step, packs: list[Pack], n_ranks: int) -> list[Pack]:
    """Packs from costly to cheap; of the micro-steps as many of the last as can be, 1/2, 1/4, ..., packed anew."""
    n_last = len(packs) // (2 * n_ranks) if n_ranks > 1 else 0
    while n_last:
        n_packs = n_ranks * n_last
        samples = sorted(i for pack in packs[-n_packs:] for i in pack)
        if len(samples) >= n_packs and step.costs[samples[0]] <= step.costs[samples].sum() / n_packs:
            last = _balanced(step, samples, n_packs)
            if last is not None:
                return packs[:-n_packs] + last
        n_last //= 2
    return packs


def _full(step: _Step) -> list[Pack]:
    """As few packs as first fit decreasing finds, one after the other."""
    lengths, samples = step.lengths[::-1].tolist(), list(range(len(step.lengths)))[::-1]
    packs = []
    while lengths:
        room = step.max_tokens - lengths.pop()
        pack = [samples.pop()]
        while lengths and lengths[0] <= room:
            longest = bisect_right(lengths, room) - 1
            room -= lengths.pop(longest)
            pack.append(samples.pop(longest))
        packs.append(pack)
    return packs


def _evened(step: _Step, packs: list[Pack], n_ranks: int) -> list[Pack]:
    """The packs from costly to cheap, those of one micro-step closer to each other."""
    return _swapped(step, _by_cost(step, packs), n_ranks, to_the_last=True)


def _swapped(step: _Step, packs: list[Pack], group: int, to_the_last: bool = False) -> list[Pack]:
    """Packs whose costs are closer to each other, within groups of `group` neighbours.

    A costly pack gives a sample to a cheap one and takes one (or none) that costs less by about half their difference,
    if there is room for it. The costliest pack swaps with the cheapest, the second with the last but one, and so on;
    `to_the_last` then the costliest alone, with whichever pack of its group suits best.
    """
    if group == 1 or not 2 <= max(map(len, packs), default=0) <= _MOST_SAMPLES_TO_SWAP:
        return packs
    n_samples = len(step.costs)
    slots = np.full((len(packs), max(map(len, packs))), n_samples)  # sample n_samples is none
    for number, pack in enumerate(packs):
        slots[number, : len(pack)] = pack
    costs, lengths = np.append(step.costs, 0.0), np.append(step.lengths, 0)
    loads, stride = costs[slots].sum(axis=1), -(-group // (2 * _MOST_SWAPS))
    shifts = [*range(0, stride * _MOST_SWAPS, stride), *[None] * _MOST_SWAPS * to_the_last]
    for shift in shifts:
        costly, cheap, excess = _pairs(loads.reshape(-1, group), shift)
        if not len(costly):
            break
        chosen, from_costly, from_cheap = _best_swaps(
            costs, lengths, slots[costly], slots[cheap], excess, costly, step.max_tokens
        )
        if not len(chosen):
            continue
        a, b = (costly[chosen], from_costly), (cheap[chosen], from_cheap)
        slots[a], slots[b] = slots[b], slots[a]
        changed = np.concatenate([a[0], b[0]])
        loads[changed] = costs[slots[changed]].sum(axis=1)
    return [[i for i in pack if i < n_samples] for pack in slots.tolist()]


def _pairs(loads: np.ndarray, shift: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a pack that costs too much and one that costs less.

    Args:
        loads: cost of each pack [groups, packs of a group].
        shift: of the cheaper half against the costlier; None pairs the costliest of a group with all others.

    Returns:
        Numbers of the costlier packs and of the cheaper ones, and what they differ by.
    """
    allowed = _BALANCED * loads.mean(axis=1)
    uneven = np.flatnonzero(loads.max(axis=1) > allowed)
    by_load = np.argsort(loads[uneven], axis=1, kind="stable") + uneven[:, None] * loads.shape[1]
    half = loads.shape[1] // 2
    if shift is None:
        cheap = by_load[:, :-1]
        costly = np.broadcast_to(by_load[:, -1:], cheap.shape)
    else:
        costly, cheap = by_load[:, : -half - 1 : -1], np.roll(by_load[:, :half], shift, axis=1)
    too_much = loads.ravel()[costly] > allowed[uneven, None]
    costly, cheap = costly[too_much], cheap[too_much]
    return costly, cheap, loads.ravel()[costly] - loads.ravel()[cheap]


def _best_swaps(
    costs: np.ndarray,
    lengths: np.ndarray,
    costly: np.ndarray,
    cheap: np.ndarray,
    excess: np.ndarray,
    costly_numbers: np.ndarray,
    max_tokens: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best swap of each costly pack, if there is one.

    Args:
        costs, lengths: of each sample.
        costly, cheap: the S samples of the packs of each of P pairs [P, S].
        excess: what the costly pack of a pair costs more [P].
        costly_numbers: which pack it is [P]; the same pack may be in several pairs.

    Returns:
        The pairs that swap, and the place of the sample in the costly and in the cheap pack.
    """
    moved = costs[costly][:, :, None] - costs[cheap][:, None, :]
    longer = lengths[costly][:, :, None] - lengths[cheap][:, None, :]
    room = max_tokens - lengths[cheap].sum(axis=1)
    useless = (moved <= 0) | (moved >= excess[:, None, None]) | (longer > room[:, None, None])
    miss = np.where(useless, np.inf, np.abs(moved - excess[:, None, None] / 2)).reshape(len(costly), -1)
    best = miss.argmin(axis=1)
    saved = excess / 2 - miss[np.arange(len(best)), best]  # by how much the costlier of the two gets cheaper
    by_saved = np.argsort(-saved, kind="stable")
    _, first = np.unique(costly_numbers[by_saved], return_index=True)
    chosen = by_saved[first]
    chosen = chosen[saved[chosen] > 0]
    return chosen, *np.divmod(best[chosen], costly.shape[1])


def _padded(packs: list[Pack], n_ranks: int) -> list[Pack]:
    """The packs, and empty ones up to a multiple of `n_ranks`."""
    return packs + [[] for _ in range(-len(packs) % n_ranks)]


def _by_cost(step: _Step, packs: list[Pack]) -> list[Pack]:
    return [packs[number] for number in np.argsort(-step.sums(packs, step.costs), kind="stable").tolist()]


def _deal(packs: list[Pack], n_ranks: int, order: Sequence[int]) -> list[list[Pack]]:
    """Deals the packs of each micro-step to the ranks, changing direction each time; indices as in `lengths`."""
    plan: list[list[Pack]] = [[] for _ in range(n_ranks)]
    for micro_step, start in enumerate(range(0, len(packs), n_ranks)):
        dealt = packs[start : start + n_ranks]
        ranks = range(n_ranks) if micro_step % 2 == 0 else reversed(range(n_ranks))
        for rank, pack in zip(ranks, dealt, strict=True):
            plan[rank].append(sorted(order[i] for i in pack))
    return plan
