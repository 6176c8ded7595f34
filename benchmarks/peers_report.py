"""What runs of several trainers on the same work come to: pure functions over what `peers/run_*.py` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]
_REFERENCE = "none"


def summarize(
    runs: dict[str, list[Run]], samples: Sequence[dict[str, Any]], batch_size: int, n_warmup: int
) -> dict[str, dict[str, Any]]:
    """By peer: rates (median over repeats, with the lowest and highest), memory, losses, and the ratio to llava_train.

    The ratio is the median over the repeats of llava_train's rate divided by the peer's: above 1 the peer is slower.
    """
    planned = planned_steps(samples, batch_size)
    reference = next((name for name in runs if name.partition(":")[0] == _REFERENCE), None)
    found = {}
    for name, each in runs.items():
        good = [run for run in each if "error" not in run]
        if not good:
            found[name] = {"error": each[0]["error"], "log": each[0]["log"]}
            continue
        steps = good[0]["steps"]
        per_sample = sum(step["n_tokens"] for step in planned) / len(samples)
        rates = [tokens_per_s(run["steps"][n_warmup:]) / per_sample for run in good]
        found[name] = {
            "samples_per_s": statistics.median(rates),
            "samples_per_s_range": [min(rates), max(rates)],
            "tokens_per_s": statistics.median(tokens_per_s(run["steps"][n_warmup:]) for run in good),
            "padding_share": 1 - _total(steps, "n_tokens") / _total(steps, "n_computed"),
            "peak_bytes": max(run["peak_cuda_bytes"] or run["peak_own_bytes"] for run in good),
            "wall_s": statistics.median(run["wall_s"] for run in good),
            "same_steps": same_steps(steps, planned),
            "losses": [step["loss"] for step in steps],
            "versions": good[0]["versions"],
            "lacks": good[0].get("lacks", []),
        }
    if reference in found and "error" not in found[str(reference)]:
        _add_ratios(found, runs, str(reference), n_warmup)
    return found


def planned_steps(samples: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, int]]:
    """Tokens and supervised tokens of each optimizer step."""
    steps = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return [{key: sum(sample[key] for sample in step) for key in ("n_tokens", "n_supervised")} for step in steps]


def tokens_per_s(steps: Sequence[dict[str, Any]]) -> float:
    """Real tokens, image tokens among them, a second."""
    return _total(steps, "n_tokens") / _total(steps, "s")


def same_steps(steps: Sequence[dict[str, Any]], planned: Sequence[dict[str, int]]) -> bool:
    """Whether a peer's steps had as many tokens and supervised tokens as planned, one by one."""
    keys = ("n_tokens", "n_supervised")
    return [[step[key] for key in keys] for step in steps] == [[step[key] for key in keys] for step in planned]


def _add_ratios(found: dict[str, dict[str, Any]], runs: dict[str, list[Run]], reference: str, n_warmup: int) -> None:
    for name, summary in found.items():
        if "error" in summary:
            continue
        repeats = zip(runs[reference], runs[name], strict=True)
        pairs = [(ours, theirs) for ours, theirs in repeats if "error" not in ours and "error" not in theirs]
        ratios = [tokens_per_s(a["steps"][n_warmup:]) / tokens_per_s(b["steps"][n_warmup:]) for a, b in pairs]
        if ratios:
            summary["ratio"] = statistics.median(ratios)
            summary["ratio_range"] = [min(ratios), max(ratios)]


def _total(steps: Sequence[dict[str, Any]], key: str) -> float:
    return sum(step[key] for step in steps)


def report(results: dict[str, Any]) -> str:
    """Two Markdown tables: rates, and losses side by side."""
    workload, peers = results["workload"], results["peers"]
    lengths = results["lengths"]
    lines = [
        f"{results['shape']}, stage {workload['stage']}, {workload['precision']}, {results['device']}, "
        f"{results['date'][:10]}, commit {results['commit']}",
        f"{len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens (mean {sum(lengths) / len(lengths):.0f}, "
        f"{results['several_turns']:.0%} with several turns, {results['text_only']:.0%} text only), "
        f"steps of {workload['batch_size']}, the first {results['n_warmup']} not timed",
        "",
        "| trainer | samples/s (lowest to highest) | tokens/s | padding | peak memory | llava_train is | same steps |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(name, found) for name, found in peers.items()]
    good = {name: found for name, found in peers.items() if "error" not in found}
    lines += ["", f"| loss at step | {' | '.join(good)} |", "|---" * (len(good) + 1) + "|"]
    for step in range(workload["n_steps"]):
        losses = [found["losses"][step] if step < len(found["losses"]) else None for found in good.values()]
        lines.append(f"| {step + 1} | " + " | ".join("" if loss is None else f"{loss:.4f}" for loss in losses) + " |")
    return "\n".join(lines)


def _line(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | failed: {found['error']} | | | | | |"
    cells = [
        _title(name, found),
        "{:.3g} ({:.3g} to {:.3g})".format(found["samples_per_s"], *found["samples_per_s_range"]),
        f"{found['tokens_per_s']:,.0f}",
        f"{found['padding_share']:.0%}",
        f"{found['peak_bytes'] / 2**30:.2f} GiB",
        "{:.2f}x as fast ({:.2f} to {:.2f})".format(found["ratio"], *found["ratio_range"]) if "ratio" in found else "",
        "yes" if found["same_steps"] else "no",
    ]
    return f"| {' | '.join(cells)} |"


def _title(name: str, found: dict[str, Any]) -> str:
    peer = name.partition(":")[0]
    package = {"none": "llava_train", "llava": "llava-torch"}.get(peer, peer)
    version = found["versions"].get(package)
    title = f"{name} {version}" if version else name
    return f"{title} (without {', '.join(found['lacks'])})" if found["lacks"] else title
