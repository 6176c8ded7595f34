"""A model of the lengths of LLaVA-1.5's instruction data (mix665k), for benchmarks where the data cannot be had.

    python benchmarks/mix665k.py --n 100000      # prints what is drawn, source by source

**Published**: rows by source. Table 7 of "Improved Baselines with Visual Instruction Tuning" (2310.03744) rounds
them; haotian-liu/LLaVA issue 657 counts `llava_v1_5_mix665k.json` by image folder: coco 364,100, vg 86,417, gqa 72,140,
ocr_vqa 80,000, textvqa 21,953, text only 40,688, in all 665,298. The split of coco below adds up to its 364,100.

**Derived from published figures**: questions a picture, for the paper merges those on one picture into one
conversation. VQAv2 443,757 on 82,783 pictures, GQA 943,000 (balanced training split) on 72,140, OCR-VQA about 4.8 each,
LLaVA's conversations about 250,000 in 57,669 rows, Visual Genome ten regions a picture, RefCOCO at most ten. Tokens of
LLaVA's own 158K: the sizes in the repository's docs/Data.md (126, 20.5 and 79.6 MB for 58K, 23K and 77K rows), less the
JSON around the texts, at 4.5 bytes a token.

**Assumed**: that turns are 1 + Poisson (ShareGPT: 1 + geometric) and tokens log-normal, and the medians and deviations
of `SOURCES` but for LLaVA's own: the form of each source's questions and answers is known (one word, a box of four
numbers, a caption), their counts of tokens were not published. ShareGPT was cut to 2,048 tokens by its authors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# vicuna_v1, in Llama's tokens: begin of sequence and system text; " USER: " and " ASSISTANT:" and "</s>" of a turn.
SYSTEM_TOKENS = 36
TURN_TOKENS = 10
END_OF_TURN_TOKENS = 1  # of these ten, the supervised one


@dataclass(frozen=True)
class Source:
    """One part of mix665k; `question` and `answer` are (median tokens, deviation of the logarithm) of a turn."""

    name: str
    rows: int
    mean_turns: float
    question: tuple[float, float]
    answer: tuple[float, float]
    first_question_extra: int = 0  # tokens of the format prompt, said once a conversation
    max_turns: int = 40
    has_image: bool = True


SOURCES = (
    Source("llava_conversation", 57_669, 4.4, (13, 0.3), (48, 0.6)),
    Source("llava_detail", 23_240, 1, (13, 0.3), (105, 0.3)),
    Source("llava_reasoning", 76_803, 1, (18, 0.3), (140, 0.35)),
    Source("sharegpt", 40_688, 3.5, (35, 1.1), (210, 0.9), has_image=False),
    Source("vqav2", 82_783, 5.4, (8, 0.25), (1.5, 0.4), 12),
    Source("gqa", 72_140, 13.1, (11, 0.35), (1.5, 0.4), 12),
    Source("okvqa", 8_998, 1, (10, 0.3), (2, 0.5), 12),
    Source("ocr_vqa", 80_000, 4.8, (9, 0.25), (4, 0.9), 12),
    Source("a_okvqa", 66_160, 1, (40, 0.2), (1, 0.1), 12),
    Source("textcaps", 21_953, 1, (75, 0.7), (15, 0.35), 12),
    Source("refcoco", 48_447, 7, (24, 0.2), (18, 0.6), max_turns=10),
    Source("vg", 86_417, 10, (24, 0.2), (14, 0.6), max_turns=10),
)


@dataclass(frozen=True)
class DrawnSample:
    """The lengths of a conversation. `turns` holds (question, answer) tokens of the texts alone; `n_tokens` adds the
    template and the image tokens, `n_supervised` the end of each turn."""

    source: str
    has_image: bool
    turns: tuple[tuple[int, int], ...]
    n_tokens: int
    n_supervised: int


def draw_samples(
    n: int,
    seed: int,
    n_image_tokens: int = 576,
    max_tokens: int = 2048,
    min_tokens: int = 0,
    one_turn: float = 0.0,
) -> list[DrawnSample]:
    """`n` samples, a function of the arguments.

    Args:
        max_tokens: longer conversations lose turns, and the end of their last answer, as in training.
        min_tokens: shorter ones get a longer last answer.
        one_turn: probability that a conversation keeps its first turn alone.
    """
    random = np.random.default_rng(seed)
    shares = np.array([source.rows for source in SOURCES]) / sum(source.rows for source in SOURCES)
    samples = []
    for number in random.choice(len(SOURCES), size=n, p=shares):
        source = SOURCES[number]
        turns = _draw_turns(source, random)
        turns = turns[:1] if random.random() < one_turn else turns
        fixed = SYSTEM_TOKENS + (n_image_tokens if source.has_image else 0)
        samples.append(_sample(source, list(_cut(turns, max_tokens - fixed)), fixed, min_tokens))
    return samples


def draw_small_samples(n: int, seed: int) -> list[DrawnSample]:
    """The scaled-down variant for two CPU cores: 90 to 700 tokens, 64 image tokens, about 40% with several turns."""
    return draw_samples(n, seed, n_image_tokens=64, max_tokens=700, min_tokens=90, one_turn=0.41)


def _draw_turns(source: Source, random: np.random.Generator) -> list[tuple[int, int]]:
    more = source.mean_turns - 1
    drawn = random.poisson(more) if source.has_image else random.geometric(1 / (1 + more)) - 1
    n_turns = source.max_turns if source.mean_turns == source.max_turns else min(1 + int(drawn), source.max_turns)
    questions, answers = (
        np.maximum(1, np.rint(median * np.exp(deviation * random.standard_normal(n_turns)))).astype(int).tolist()
        for median, deviation in (source.question, source.answer)
    )
    questions[0] += source.first_question_extra
    return list(zip(questions, answers, strict=True))


def _cut(turns: list[tuple[int, int]], room: int) -> Iterator[tuple[int, int]]:
    """The turns that fit in `room` tokens; the last answer is cut, to one token at the least."""
    for number, (question, answer) in enumerate(turns):
        room -= TURN_TOKENS
        if number > 0 and room <= question:
            return
        question = min(question, room - 1)
        answer = min(answer, room - question)
        room -= question + answer
        yield question, answer


def _sample(source: Source, turns: list[tuple[int, int]], fixed: int, min_tokens: int) -> DrawnSample:
    n_tokens = fixed + sum(question + answer + TURN_TOKENS for question, answer in turns)
    missing = max(0, min_tokens - n_tokens)
    turns = [*turns[:-1], (turns[-1][0], turns[-1][1] + missing)]
    n_supervised = sum(answer + END_OF_TURN_TOKENS for _, answer in turns)
    return DrawnSample(source.name, source.has_image, tuple(turns), n_tokens + missing, n_supervised)


def describe(samples: list[DrawnSample]) -> dict[str, float]:
    """What a report says of drawn samples."""
    n_tokens = np.array([sample.n_tokens for sample in samples])
    return {
        "samples": len(samples),
        "mean_tokens": round(float(n_tokens.mean()), 1),
        "percentiles_5_50_95_99": np.percentile(n_tokens, [5, 50, 95, 99]).round().astype(int).tolist(),
        "shortest": int(n_tokens.min()),
        "longest": int(n_tokens.max()),
        "several_turns": round(sum(len(sample.turns) > 1 for sample in samples) / len(samples), 3),
        "text_only": round(sum(not sample.has_image for sample in samples) / len(samples), 3),
        "supervised": round(sum(sample.n_supervised for sample in samples) / int(n_tokens.sum()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    samples = draw_samples(arguments.n, arguments.seed)
    for source in SOURCES:
        print(source.name, json.dumps(describe([sample for sample in samples if sample.source == source.name])))
    print("all", json.dumps(describe(samples)))
    print("small", json.dumps(describe(draw_small_samples(arguments.n, arguments.seed))))


if __name__ == "__main__":
    main()
