"""Exact-batch packing at scale, simulated on the lengths of mix665k (mix665k.py): balance, micro-steps, planning time.

    python benchmarks/packing_scale.py --out benchmarks/results/packing_scale-cpu-DATE.json

For each batch, number of ranks and `batch.max_tokens` it plans steps of drawn samples and measures

- efficiency: mean load of the ranks / largest load, over the micro-steps (all ranks wait for the costliest pack of
  each), a load being the cost of a pack's tokens and of their attention in a language model of `--hidden-size`;
- micro-steps of a step, and how many its tokens need at the least;
- planning: CPU milliseconds per 1,000 samples on one core, the least and the median over the steps and repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import about_this
from mix665k import draw_samples

from llava_train.data.packing import attention_cost_of, plan_packs, sample_cost

RANKS, BATCHES, MAX_TOKENS = (1, 8, 64, 256, 1024), (128, 256, 1024, 8192), (2048, 4096, 8192, 16384)
GOAL, GOAL_SAMPLES = 0.97, 8
_REPETITIONS = 3


def measure(steps: list[list[int]], n_ranks: int, max_tokens: int, attention_cost: float) -> dict[str, Any]:
    """What the plans of `steps`, lists of lengths, are worth."""
    total = waited_for = 0.0
    worst, planning_ms, n_micro_steps = 1.0, [], []
    for lengths in steps:
        for _ in range(_REPETITIONS):
            started = time.process_time()
            plan = plan_packs(lengths, n_ranks, max_tokens, attention_cost)
            planning_ms.append((time.process_time() - started) * 1e6 / len(lengths))
        loads = np.array(
            [[sum(sample_cost(lengths[i], attention_cost) for i in pack) for pack in rank] for rank in plan]
        )
        costliest = n_ranks * loads.max(axis=0).sum()
        total, waited_for = total + loads.sum(), waited_for + costliest
        worst = min(worst, loads.sum() / costliest)
        n_micro_steps.append(loads.shape[1])
    return {
        "efficiency": round(total / waited_for, 4),
        "efficiency_of_worst_step": round(float(worst), 4),
        "micro_steps": round(statistics.mean(n_micro_steps), 1),
        "micro_steps_at_least": round(statistics.mean(-(-sum(x) // (n_ranks * max_tokens)) for x in steps), 1),
        "planning_ms_per_1000": round(min(planning_ms), 2),
        "planning_ms_per_1000_median": round(statistics.median(planning_ms), 2),
    }


def measure_all(n_steps: int, hidden_size: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for batch in BATCHES:
        lengths = [sample.n_tokens for sample in draw_samples(batch * n_steps, seed)]
        steps = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
        for max_tokens in MAX_TOKENS:
            for n_ranks in (n for n in RANKS if n <= batch):
                found = measure(steps, n_ranks, max_tokens, attention_cost_of(hidden_size))
                rows.append({"batch": batch, "max_tokens": max_tokens, "ranks": n_ranks, **found})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: efficiency, and micro-steps in brackets, by batch and max_tokens (down) and ranks (across)."""
    lines = [
        "| batch | max_tokens | " + " | ".join(f"{n} ranks" for n in RANKS) + " |",
        "|---" * (len(RANKS) + 2) + "|",
    ]
    found = {(row["batch"], row["max_tokens"], row["ranks"]): row for row in rows}
    for batch in BATCHES:
        for max_tokens in MAX_TOKENS:
            row = [found.get((batch, max_tokens, n)) for n in RANKS]
            cells = [f"{cell['efficiency']:.1%} ({cell['micro_steps']:g})" if cell else "" for cell in row]
            lines.append(f"| {batch:,} | {max_tokens:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The goals: efficiency where each rank has enough samples, and planning time of the larger batches."""
    enough = [row for row in rows if row["batch"] >= GOAL_SAMPLES * row["ranks"]]
    large = [row for row in rows if row["batch"] >= 1024]
    missed = [(row["batch"], row["max_tokens"], row["ranks"]) for row in enough if row["efficiency"] < GOAL]
    return {
        f"below_{GOAL}_with_{GOAL_SAMPLES}_samples_a_rank": missed,
        "least_efficiency_by_max_tokens": {
            n: min(row["efficiency"] for row in enough if row["max_tokens"] == n) for n in MAX_TOKENS
        },
        "most_planning_ms_per_1000_by_max_tokens": {
            n: max(row["planning_ms_per_1000"] for row in large if row["max_tokens"] == n) for n in MAX_TOKENS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each combination")
    parser.add_argument("--hidden-size", type=int, default=4096, help="of the language model; 4096 is Vicuna 7B's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = measure_all(arguments.steps, arguments.hidden_size, arguments.seed)
    about = {**about_this("cpu"), "cores_used": 1, "load_average": round(os.getloadavg()[0], 1)}
    result = {**about, "summary": summary(rows), "rows": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
