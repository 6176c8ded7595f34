"""The doctor's report in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_train.data.problems import KINDS
from llava_train.inspect.check import NOTES

_BAR = 40


def print_report(console: Console, found: dict[str, Any]) -> None:
    """Prints a `check.summary`."""
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
    _print_sources(console, found["sources"])
    _print_findings(console, "What would be lost", found["problems"], KINDS, "red")
    _print_findings(console, "What is handled", found["notes"], NOTES, "yellow")
    if found["would_lose"]:
        console.print("[bold red]Something would be lost.[/] --write-clean OUT.jsonl writes the rest.")
    else:
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


def _print_findings(console: Console, title: str, findings: dict[str, Any], words: dict[str, str], colour: str) -> None:
    if not findings:
        return
    console.print(f"[bold {colour}]{title}[/]")
    for kind, found in findings.items():
        console.print(f"  {found['n']:,} x [bold]{kind}[/]: {words[kind]}", highlight=False)
        for example in found["examples"]:
            line = f", line {example['line']}" if example["line"] else ""
            place = f"{example['source']}: {example['id']!r} (number {example['index']}{line})"
            console.print(f"      {escape(place)}: {escape(example['reason'])}", style="dim", highlight=False)
