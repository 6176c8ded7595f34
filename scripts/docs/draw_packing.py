"""Draws docs/explanation/packing.svg: one optimizer step padded, packed across steps, and packed exactly.

    python scripts/docs/draw_packing.py            # writes it; a test compares

Lengths are drawn from the model of LLaVA-1.5's instruction data (benchmarks/mix665k.py), packs come from the planner
that trains. The drawing is narrow, so that it reads on a phone, and takes its text colour from the page around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from mix665k import draw_samples  # noqa: E402

from llava_train.data.packing import attention_cost_of, plan_packs  # noqa: E402

FIGURE = ROOT / "docs/explanation/packing.svg"
N_SAMPLES, N_RANKS, MAX_TOKENS, HIDDEN_SIZE, SEED = 16, 2, 4096, 4096, 6
N_MICRO_STEPS = 2
_WIDTH, _LEFT, _ROW, _GAP = 400, 92, 11, 3
_SCALE = (_WIDTH - _LEFT - 2) / MAX_TOKENS

Row = list[tuple[int, str]]
"""A micro-batch from left to right: tokens and what they are: `a`, `b` (samples of the step in turn), `next`, `pad`."""

_STYLE = """
svg:root { color: #222 }
@media (prefers-color-scheme: dark) { svg:root { color: #ddd; background: #1e2129 } }
#packing text { fill: currentColor; font: 11px system-ui, sans-serif }
#packing .title { font-weight: 600; font-size: 12px }
#packing .a { fill: #00897b }
#packing .b { fill: #4db6ac }
#packing .next { fill: #fb8c00 }
#packing .pad { fill: currentColor; fill-opacity: .13; stroke: currentColor; stroke-opacity: .35 }
#packing .border { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 4 3 }
"""


def draw() -> str:
    """The drawing, as SVG."""
    stream = [sample.n_tokens for sample in draw_samples(50 * N_SAMPLES, SEED)]
    step = stream[:N_SAMPLES]
    parts: list[str] = []
    y = _panel(parts, 14, *padded(step))
    y = _panel(parts, y + 26, *across_steps(stream))
    y = _panel(parts, y + 26, *exact(step))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 4:.1f}" id="packing" '
        'style="max-width: 640px">'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def padded(step: Sequence[int]) -> tuple[str, list[str], list[str], list[Row]]:
    """Micro-batches of four samples, each as wide as its longest."""
    size = N_SAMPLES // (N_RANKS * N_MICRO_STEPS)
    rows: list[Row] = []
    computed = 0
    for start in range(0, N_SAMPLES, size):
        batch = step[start : start + size]
        computed += size * max(batch)
        rows += [[(n_tokens, _shade(start + i)), (max(batch) - n_tokens, "pad")] for i, n_tokens in enumerate(batch)]
    labels = [name if i % size == 0 else "" for i in range(N_SAMPLES) for name in [_place(i // size)]]
    share = 1 - sum(step) / computed
    return "Padded: micro-batches of 4 samples", [f"{share:.0%} of what is computed is padding"], labels, rows


def across_steps(stream: Sequence[int]) -> tuple[str, list[str], list[str], list[Row]]:
    """Packs that are filled from the stream of samples, wherever a step ends."""
    packs: list[list[int]] = [[]]
    for number, n_tokens in enumerate(stream):
        if sum(stream[i] for i in packs[-1]) + n_tokens > MAX_TOKENS:
            packs.append([])
        packs[-1].append(number)
    n_packs = N_RANKS * N_MICRO_STEPS
    counts = [sum(map(len, packs[i : i + n_packs])) for i in range(0, len(packs) - n_packs, n_packs)]
    rows = [[(stream[i], _shade(i) if i < N_SAMPLES else "next") for i in pack] for pack in packs[:n_packs]]
    said = [
        f"this step has {counts[0]} samples, others {min(counts)} to {max(counts)}:",
        "no step is that of the recipe",
    ]
    return "Packed across steps", said, [_place(i) for i in range(n_packs)], rows


def exact(step: Sequence[int]) -> tuple[str, list[str], list[str], list[Row]]:
    """What llava_train does."""
    plan = plan_packs(step, N_RANKS, MAX_TOKENS, attention_cost_of(HIDDEN_SIZE))
    packs = [(rank, micro_step) for micro_step in range(len(plan[0])) for rank in range(N_RANKS)]
    rows = [[(step[i], _shade(i)) for i in plan[rank][micro_step]] for rank, micro_step in packs]
    labels = [_label(rank, micro_step) for rank, micro_step in packs]
    said = [f"the {len(step)} samples of the step, no padding, equal work"]
    return f"Exact-batch packs: {N_RANKS} ranks x {len(plan[0])} micro-steps", said, labels, rows


def _shade(number: int) -> str:
    return "ab"[number % 2]


def _place(number: int) -> str:
    micro_step, rank = divmod(number, N_RANKS)
    return _label(rank, micro_step)


def _label(rank: int, micro_step: int) -> str:
    return f"rank {rank}, micro {micro_step + 1}"


def _panel(parts: list[str], y: float, title: str, said: list[str], labels: list[str], rows: list[Row]) -> float:
    """Adds a title, rows and what is to be said of them; returns where they end."""
    parts.append(f'<text class="title" x="0" y="{y}">{title}</text>')
    y += 7
    for label, row in zip(labels, rows, strict=True):
        if label:
            parts.append(f'<text x="0" y="{y + _ROW - 2:.1f}">{label}</text>')
        parts.extend(_bars(row, y))
        y += _ROW + _GAP
    if all(labels):  # rows are packs
        x, top = _LEFT + MAX_TOKENS * _SCALE, y - len(rows) * (_ROW + _GAP) - 2
        parts.append(f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{y:.1f}"/>')
    for line in said:
        y += 13
        parts.append(f'<text x="{_LEFT}" y="{y:.1f}">{line}</text>')
    return y


def _bars(row: Row, y: float) -> Iterator[str]:
    x = float(_LEFT)
    for n_tokens, kind in row:
        width = n_tokens * _SCALE
        if width:
            yield f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" height="{_ROW}"/>'
        x += width


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
