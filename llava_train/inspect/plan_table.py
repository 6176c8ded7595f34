"""A plan in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_train.inspect.plan import Plan, usable
from llava_train.train.memory import gib


def print_plan(console: Console, plan: Plan) -> None:
    """Prints the memory of a GPU by kind, what the steps are like, and what to change if it does not fit."""
    console.print(_memory(plan))
    console.print(_steps(plan))
    if plan.fits:
        console.print("[bold green]It fits.[/]")
    elif plan.remedy:
        console.print("[bold red]It does not fit.[/] The first change that makes it fit:")
        console.print(escape(f"  {plan.remedy}"), highlight=False)
    else:
        console.print("[bold red]It does not fit[/], and no change of keys makes it: take more or larger GPUs.")


def _memory(plan: Plan) -> Table:
    estimate, budget = plan.estimate, usable(plan.memory)
    title = f"Memory of each of {plan.n_ranks} GPUs: {plan.config.name}"
    table = Table("kind", "memory", "share", title=escape(title), title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for kind, n_bytes in estimate.by_kind().items():
        table.add_row(kind, gib(n_bytes), f"{n_bytes / budget:.0%}")
    table.add_section()
    table.add_row("in all", gib(estimate.total_bytes), f"{estimate.total_bytes / budget:.0%}")
    table.add_row("usable", f"{gib(budget)} of {gib(plan.memory)}", "")
    if estimate.held.on_host:
        table.add_row("offloaded to the host", gib(estimate.held.on_host), "")
    return table


def _steps(plan: Plan) -> Table:
    packing, estimate = plan.packing, plan.estimate
    asked = plan.config.engine.activation_checkpointing
    chosen = estimate.recompute if asked != "auto" else f"{estimate.recompute} (auto)"
    others = "".join(f"; {one.recompute}: {gib(one.total_bytes)}" for one in plan.estimates[:-1])
    table = Table(show_header=False, box=None)
    for name, value in {
        "activation checkpointing": chosen + others,
        "heaviest pack": str(estimate.pack),
        "lengths": plan.lengths.origin,
        "a sample": f"{plan.lengths.n_tokens.mean():,.0f} tokens (mean), {plan.lengths.n_tokens.max():,} (longest)",
        "a step": f"{plan.config.batch.size:,} samples, {packing.tokens:,.0f} tokens, {packing.micro_steps:.1f} "
        f"micro-steps, {packing.micro_steps * plan.n_ranks:,.0f} packs",
        "packs": f"no padding, {packing.fill:.0%} of batch.max_tokens, ranks balanced to {packing.balance:.0%}",
        "steps": "unknown: the number of samples is not known" if plan.n_steps is None else f"{plan.n_steps:,}",
        "hours": f"unknown: {plan.speed}" if plan.hours is None else f"{plan.hours:,.1f}, at {plan.speed}",
    }.items():
        table.add_row(name, escape(value))
    return table
