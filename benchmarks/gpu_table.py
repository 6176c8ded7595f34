"""The results of `benchmarks/gpu.py` as text, the narrow end of a log in mind."""

from __future__ import annotations

from typing import Any

_COLUMNS = ("TFLOP/s", "MFU", "tokens/s", "samples/s", "GiB", "with")


def table(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Training first, then what was found otherwise, then what failed."""
    width = max([4, *map(len, results)])
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['device']}; {versions}; commit {about['commit']}", ""]
    lines.append(f"{'':{width}} {'TFLOP/s':>8} {'MFU':>6} {'tokens/s':>9} {'samples/s':>9} {'GiB':>6}  with")
    lines += [_training(name, found, width) for name, found in results.items() if "tokens_per_s" in found]
    lines += [""] + [line for name, found in results.items() for line in _others(name, found)]
    lines += [f"{name}: FAILED: {found['error']}" for name, found in results.items() if "error" in found]
    return "\n".join(lines)


def _training(name: str, found: dict[str, Any], width: int) -> str:
    tflops, mfu = found["tflops"], found["mfu"]
    how = f"{found['kernels']}, recompute {found['activation_checkpointing']}, packs <= {found['max_tokens']}"
    return (
        f"{name:{width}} {'-' if tflops is None else f'{tflops:.4g}':>8} {'-' if mfu is None else f'{mfu:.1%}':>6} "
        f"{found['tokens_per_s']:>9,.0f} {found['samples_per_s']:>9.1f} {found['peak_gib']:>6.1f}  {how}"
    )


def _others(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    if "waits_a_step" in found:
        places = ", ".join(f"{place} x{count}" for place, count in found["waits"].items())
        lines.append(
            f"{name}: {found['waits_a_step']} waits in a step of {found['packs_of_that_step']} packs: {places}"
        )
    if "graphs" in found:
        lines.append(f"{name}: {found['graphs']} graphs compiled, {found['graphs_of_new_lengths']} of them late")
    if "idle" in found.get("profile", {}):
        top = list(found["profile"]["top"].items())[:6]
        lines.append(f"{name}: device idle {found['profile']['idle']:.1%}; most time in:")
        lines += [f"    {share:6.1%}  {kernel[:90]}" for kernel, share in top]
    if name == "correctness" and "ok" in found:
        lines.append(f"correctness: {'within' if found['ok'] else 'OUT OF'} bounds")
        for what, errors in found.items():
            if isinstance(errors, dict):
                lines.append(f"    {what}: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    if name in ("attention", "encoder"):
        for what, numbers in found.items():
            if isinstance(numbers, dict):
                lines.append(f"{name}, {what}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    return lines
