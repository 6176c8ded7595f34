"""A plan in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_train.inspect.plan import Plan, usable
from llava_train.train.memory import gib
from llava_train.train.pace import about


def print_plan(console: Console, plan: Plan) -> None:
    """Prints the memory of a GPU by kind, what the steps are like, and what to change if it does not fit."""
    console.print(_memory(plan))
    console.print(_steps(plan))
    for note in plan.notes:
        console.print(f"[bold yellow]Note:[/] {escape(note)}", highlight=False)
    if plan.fits:
        console.print("[bold green]It fits.[/]")
    elif plan.remedy:
        console.print("[bold red]It does not fit.[/] The first change that makes it fit:")
        console.print(escape(f"  {plan.remedy}"), highlight=False)
    else:
        console.print("[bold red]It does not fit[/], and no change of keys makes it: take more or larger GPUs.")


def _memory(plan: Plan) -> Table:
    estimate, budget = plan.estimate, usable(plan.memory)
    one, many = ("the GPU", "GPUs") if plan.on_cuda else ("the process on the CPU", "processes on CPUs")
    where = one if plan.n_ranks == 1 else f"each of {plan.n_ranks:,} {many}"
    title = f"Memory of {where}: {plan.config.name}"
    table = Table("kind", "memory", "share", title=escape(title), title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for kind, n_bytes in estimate.by_kind().items():
        table.add_row(kind, gib(n_bytes), percent(n_bytes / budget))
    table.add_section()
    table.add_row("in all", gib(estimate.total_bytes), percent(estimate.total_bytes / budget))
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
        "packs": f"no padding, {percent(packing.fill)} of batch.max_tokens, ranks balanced to {packing.balance:.0%}",
        "steps": _n_steps(plan),
        "time": f"unknown: {plan.speed}"
        if plan.hours is None
        else f"about {about(3600 * plan.hours)}, at {plan.speed}",
    }.items():
        table.add_row(name, escape(value))
    return table


def _n_steps(plan: Plan) -> str:
    if plan.n_steps is None:
        return "unknown: the number of samples is not known"
    at_most = " at most, as the number of samples is not known" if plan.lengths.n_samples is None else ""
    return f"{plan.n_steps:,}{at_most}"


def _time(plan: Plan) -> str:
    return f"unknown: {plan.speed}" if plan.hours is None else f"about {about(3600 * plan.hours)}, at {plan.speed}"


def percent(share: float) -> str:
    """A share for people: `12%`, and `<1%` for what rounds to nothing."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"
