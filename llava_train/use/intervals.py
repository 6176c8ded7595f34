"""95 % confidence intervals of scores that are a ratio of sums over questions.

Every score here is one: an accuracy is (right answers) / (questions), F1 is 2 TP / (2 TP + FP + FN). A proportion, each
question being right or wrong, gets Wilson's interval (1927), which also holds for few questions and at 0 and 1, and
takes the questions for independent. Any other gets the percentile bootstrap (Efron 1979), which draws whole groups of
questions: those about one picture are not independent, and taking them for it makes intervals too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)
_N_DRAWS = 2000


def wilson(n_right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) where there is nothing to tell it by."""
    if not n:
        return 0.0, 1.0
    share, spread = n_right / n, _Z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[Hashable],
    highest: float = 1.0,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of sum(numerators) / sum(denominators); Wilson's where all draws are alike.

    Args:
        numerators, denominators: of each question.
        groups: of each question, what it shares with others: its picture. Groups are drawn, not questions.
        highest: what the ratio can reach.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    which, n_groups = [numbers[group] for group in groups], len(numbers)
    above, below = (np.bincount(which, values, n_groups) for values in (numerators, denominators))
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(_N_DRAWS):
        chosen = rng.integers(n_groups, size=n_groups)
        total = below[chosen].sum()
        drawn.append(above[chosen].sum() / total if total else 0.0)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    if low == high:  # ten right answers of ten do not make it certain
        low, high = (highest * bound for bound in wilson(low / highest * n_groups, n_groups))
    return low, high
