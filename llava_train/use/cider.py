"""CIDEr-D of captions (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726), as the COCO caption evaluation computes it.

A caption and a reference are compared by the cosine of their n-gram vectors, n from 1 to 4. An n-gram weighs its count
times its inverse document frequency, a document being all references of one question. Counts of the caption are
clipped to the reference's, so that repeating words gains nothing, and a difference in length of `d` words costs
exp(-d^2 / (2 * 6^2)). The score is ten times the mean over n and references; given the same tokens it equals
`pycocoevalcap` 1.2.

The difference: COCO's scores are of tokens of Stanford's PTBTokenizer, a Java program. `tokens` follows its rules for
what captions hold (lower case, no punctuation, `man's` -> `man 's`, `don't` -> `do n't`), not for all that text holds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
_TOKEN = re.compile(
    r"can(?=not\b)|\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|o'clock\b"
    r"|\w+(?:(?:[-./@]|(?<=\d)[,:](?=\d))\w+)*|[#$%&]"
)

_Gram = tuple[str, ...]
_Counts = list[Counter[_Gram]]
"""Counts of n-grams, for each n."""


def tokens(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    return _TOKEN.findall(caption.lower().replace("\u2019", "'"))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption, 0 to 10; their mean is the score of all.

    Document frequencies are of these references: with a single picture every score is 0.

    Args:
        references: of each caption, one or more.
    """
    documents = [[_counted(tokens(reference)) for reference in each] for each in references]
    seen_in = Counter(gram for each in documents for gram in {g for ref in each for n in ref for g in n})
    log_n = math.log(len(documents)) if documents else 0.0
    rarity = {gram: log_n - math.log(n) for gram, n in seen_in.items()}
    scores = []
    for caption, each in zip(captions, documents, strict=True):
        given = _counted(tokens(caption))
        similar = [_similarity(given, reference, rarity, log_n) for reference in each]
        scores.append(_SCALE * sum(similar) / len(similar))
    return scores


def _counted(words: list[str]) -> _Counts:
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, _LONGEST + 1)]


def _similarity(given: _Counts, reference: _Counts, rarity: dict[_Gram, float], rarest: float) -> float:
    """The mean over n of the clipped cosines, times the penalty for another length."""
    n_more = given[0].total() - reference[0].total()
    cosines = []
    for ours, theirs in zip(given, reference, strict=True):
        weight = {gram: rarity.get(gram, rarest) ** 2 for gram in (*ours, *theirs)}
        product = sum(min(n, theirs[gram]) * theirs[gram] * weight[gram] for gram, n in ours.items())
        squares = [sum(n**2 * weight[gram] for gram, n in each.items()) for each in (ours, theirs)]
        cosines.append(product / math.sqrt(squares[0] * squares[1]) if all(squares) else 0.0)
    return sum(cosines) / _LONGEST * math.exp(-(n_more**2) / (2 * _SIGMA**2))
