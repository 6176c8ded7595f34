"""The doctor's report: as plain values, and in the terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_train.config import StageConfig
from llava_train.data.mixture import Mixture
from llava_train.data.problems import KINDS
from llava_train.inspect.check import NOTES, Checked, Examined
from llava_train.inspect.opening import StageData
from llava_train.train.schedule import unreached_steps

_NOT_THERE = ("image_missing", "path_outside_root")
_NEARLY_ALL = 0.9
"""Share of the samples with pictures from which on a wrong `images:` is the likely cause."""
_BAR = 40
_N_EXAMPLES = 5
_N_UNREAD_KEYS = 20


def summary(config: StageConfig, data: StageData, checked: Checked) -> dict[str, Any]:
    """The report as plain values: what `--json` prints."""
    counts = Counter(finding.kind for finding in checked.findings)
    examples: dict[str, list[dict[str, Any]]] = {}
    for finding in checked.findings:
        shown = examples.setdefault(finding.kind, [])
        if len(shown) < _N_EXAMPLES:
            shown.append({name: value for name, value in vars(finding).items() if name != "kind"})
    of_kinds = {kind: {"n": n, "examples": examples[kind]} for kind, n in counts.most_common()}
    n_tokens = np.concatenate([np.array(e.n_tokens, dtype=np.int64) for e in checked.by_source])
    good = n_tokens[n_tokens > 0]
    total = {name: sum(sum(getattr(e, name)) for e in checked.by_source) for name in ("n_supervised", "n_images")}
    return {
        "name": config.name,
        "would_lose": checked.would_lose,
        "n_samples": len(n_tokens),
        "n_samples_an_epoch": len(checked.lengths),
        "n_bad": int((n_tokens == 0).sum()),
        "n_images": total["n_images"],
        "n_tokens": int(good.sum()),
        "share_supervised": total["n_supervised"] / max(1, int(good.sum())),
        "tokens": _distribution(good),
        "sources": _by_source(data.mixture, checked.by_source),
        "held_out": _by_source(data.held_out, checked.held_out) if data.held_out else {},
        "problems": {kind: found for kind, found in of_kinds.items() if kind not in NOTES},
        "notes": {kind: found for kind, found in of_kinds.items() if kind in NOTES},
        "unread_keys": {
            source.name: dict(e.unread.most_common())
            for source, e in zip(data.mixture.sources, checked.by_source, strict=True)
            if e.unread
        },
        "refusal": checked.refusal,
        "warnings": list(checked.warnings),
        "wrong_images": [*_wrong_images(data.mixture, checked.by_source), *_held_out_images(data, checked)],
        "n_steps": checked.n_steps,
        "max_steps_not_reached": unreached_steps(config.schedule, len(checked.lengths), config.batch.size),
        "packing": checked.packing,
    }


def _held_out_images(data: StageData, checked: Checked) -> list[str]:
    return _wrong_images(data.held_out, checked.held_out) if data.held_out else []


def _wrong_images(mixture: Mixture, examined: Sequence[Examined]) -> list[str]:
    """Return a question for each source nearly all of whose pictures are missing: it is the place that is wrong."""
    questions = []
    for source, found in zip(mixture.sources, examined, strict=True):
        missing = [finding for finding in found.findings if finding.kind in _NOT_THERE]
        n_pictured = len(missing) + sum(n > 0 for n in found.n_images)
        if missing and len(missing) >= _NEARLY_ALL * n_pictured:
            questions.append(
                f"{source.path}: {len(missing):,} of {n_pictured:,} samples with pictures name some that are not where "
                f"they are looked for. Is `images:` of this source right? {missing[0].reason} (paths count from "
                f"{Path.cwd()})"
            )
    return questions


def _by_source(mixture: Mixture, examined: Sequence[Examined]) -> dict[str, dict[str, int]]:
    return {
        source.name: {"n_samples": len(e.indices), "n_bad": e.n_tokens.count(0), "n_tokens": sum(e.n_tokens)}
        for source, e in zip(mixture.sources, examined, strict=True)
    }


def _distribution(n_tokens: np.ndarray) -> dict[str, Any]:
    if not len(n_tokens):
        return {}
    heights, edges = np.histogram(n_tokens, bins=min(16, len(np.unique(n_tokens))))
    return {
        "min": int(n_tokens.min()),
        "median": float(np.median(n_tokens)),
        "p95": float(np.percentile(n_tokens, 95)),
        "max": int(n_tokens.max()),
        "histogram": [[float(edge), int(height)] for edge, height in zip(edges, heights, strict=False)],
    }


def printable(text: str) -> str:
    """A text of the data for the terminal, which must not obey it: control characters as their symbols."""
    return text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421})


def print_report(console: Console, found: dict[str, Any]) -> None:
    """Prints a `summary`."""
    tokens, packing = found["tokens"], found["packing"]
    table = Table(show_header=False, box=None, title=f"The data of {found['name']}", title_justify="left")
    for name, value in {
        "samples": f"{found['n_samples']:,} ({found['n_samples_an_epoch']:,} an epoch)",
        "images": f"{found['n_images']:,}",
        "tokens": f"{found['n_tokens']:,}, {found['share_supervised']:.1%} supervised",
        "tokens a sample": "min {min:,}, median {median:,.0f}, 95% {p95:,.0f}, max {max:,}".format(**tokens)
        if tokens
        else "none",
        "steps": f"{found['n_steps']:,}",
        "packing": f"{packing['micro_steps_a_step']:.1f} micro-steps a step on {packing['ranks']} ranks, packs "
        f"{packing['fill']:.0%} full, ranks balanced to {packing['balance']:.0%}",
    }.items():
        table.add_row(name, value)
    console.print(table)
    _print_histogram(console, tokens.get("histogram", []))
    _print_sources(console, found["sources"] | {f"held out: {name}": n for name, n in found["held_out"].items()})
    _print_findings(console, "What would be lost", found["problems"], KINDS, "red")
    _print_findings(console, "What is handled", found["notes"], NOTES, "yellow")
    if unreached := found["max_steps_not_reached"]:
        console.print(f"[bold yellow]Note:[/] {unreached}", highlight=False)
    _print_unread_keys(console, found["unread_keys"])
    for warning in found["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
    if found["clean"]:
        console.print("What can be trained on was written; in the stage file it is", highlight=False)
        for section in found["clean"]:
            console.print(escape(f"  - {json.dumps(section, ensure_ascii=False)}"), highlight=False)
    for note in found["clean_notes"]:
        console.print(f"[yellow]{escape(printable(note))}[/]", highlight=False)
    if found["refusal"]:
        console.print(f"[bold red]A run would be refused:[/] {escape(found['refusal'])}", highlight=False)
    for question in found["wrong_images"]:
        console.print(f"[bold red]{escape(printable(question))}[/]", highlight=False)
    if found["would_lose"] and (found["problems"] or not found["refusal"]):
        is_left = found["n_bad"] < found["n_samples"]
        advice = " --write-clean OUT.jsonl writes the rest." if is_left and not found["wrong_images"] else ""
        console.print(f"[bold red]{'Something' if is_left else 'Everything'} would be lost.[/]{advice}")
    elif not found["would_lose"]:
        console.print("[bold green]Every sample can be trained on.[/]")


def _print_histogram(console: Console, histogram: list[list[float]]) -> None:
    highest = max((height for _, height in histogram), default=1)
    for edge, height in histogram:
        console.print(f"  {edge:>8,.0f} {'█' * round(_BAR * height / highest):<{_BAR}} {height:,}", highlight=False)


def _print_sources(console: Console, sources: dict[str, dict[str, int]]) -> None:
    table = Table("source", "samples", "bad", "tokens")
    for name, counts in sources.items():
        table.add_row(escape(name), *(f"{counts[key]:,}" for key in ("n_samples", "n_bad", "n_tokens")))
    console.print(table)


def _print_unread_keys(console: Console, unread: dict[str, dict[str, int]]) -> None:
    """Prints the keys of records that nothing reads, with the number of records that have a value there."""
    if unread:
        console.print("[bold]Keys that nothing reads[/]")
    for name, counts in unread.items():
        listed = ", ".join(f"{key} ({n:,})" for key, n in list(counts.items())[:_N_UNREAD_KEYS])
        more = f" and {len(counts) - _N_UNREAD_KEYS:,} more" if len(counts) > _N_UNREAD_KEYS else ""
        console.print(escape(printable(f"  {name}: {listed}{more}")), highlight=False)


def _print_findings(console: Console, title: str, findings: dict[str, Any], words: dict[str, str], colour: str) -> None:
    if not findings:
        return
    console.print(f"[bold {colour}]{title}[/]")
    for kind, found in findings.items():
        console.print(f"  {found['n']:,} x [bold]{kind}[/]: {words[kind]}", highlight=False)
        for example in found["examples"]:
            line = f", line {example['line']}" if example["line"] else ""
            place = f"{example['source']}: {example['id']!r} (number {example['index']}{line})"
            console.print("      " + escape(printable(f"{place}: {example['reason']}")), style="dim", highlight=False)
