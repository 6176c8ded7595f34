"""The whole examination: all checks, the table, and the JSON of a bug report."""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_train.doctor import machine, packages, probe, trial
from llava_train.doctor.findings import Finding, Level, discreet, found
from llava_train.doctor.processes import Ended

_OUTPUT_CHARACTERS = 8000
_STYLES = {Level.ok: "green", Level.note: "cyan", Level.warning: "yellow", Level.broken: "bold red"}


def examine(as_json: bool) -> int:
    """Looks at everything and prints what was found; the exit code is 1 when something needed is broken."""
    with Console(stderr=True).status("looking around, and training one step"):
        findings, ended = look()
    if as_json:
        print(json.dumps(as_record(findings, ended), indent=2))
    else:
        print_table(findings, Console())
    return 1 if is_broken(findings) else 0


def look() -> tuple[list[Finding], Ended]:
    """All findings, and the process that trained a step."""
    modules = [one.module for one in packages.OPTIONAL if packages.installed(one.distribution)]
    with ThreadPoolExecutor() as threads:
        step = threads.submit(trial.try_step)
        probing = threads.submit(probe.probe, modules)
        asking = threads.submit(found, "hub", machine.hub)
        findings = found("python", packages.python_version) + found("packages", packages.required)
        findings += found("devices", lambda: probe.devices(probing.result(), machine.drivers()))
        findings += found("optional", lambda: packages.optional(probing.result().errors))
        findings += found("tools", machine.tools) + found("variables", machine.environment)
        findings += found("disks", machine.disks) + asking.result()
        findings += found("training", lambda: trial.trained(step.result()))
    return [replace(one, text=discreet(one.text), mend=discreet(one.mend)) for one in findings], step.result()


def is_broken(findings: list[Finding]) -> bool:
    return any(one.level is Level.broken for one in findings)


def as_record(findings: list[Finding], ended: Ended) -> dict[str, Any]:
    """What a bug report needs; the output of the trained step only where it failed."""
    return {
        "ready": not is_broken(findings),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": packages.versions(),
        "findings": [asdict(one) for one in findings],
        "output": discreet(ended.output)[-_OUTPUT_CHARACTERS:] if ended.code else None,
    }


def print_table(findings: list[Finding], console: Console) -> None:
    """A row a finding, what to do below it, and the sum in one line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = None
    for one in findings:
        text = escape(one.text) + (f"\n[dim]-> {escape(one.mend)}[/]" if one.mend else "")
        style = _STYLES[one.level]
        table.add_row(f"[{style}]{one.level.value}[/]", "" if one.topic == topic else one.topic, text)
        topic = one.topic
    console.print(table)
    n_broken = sum(one.level is Level.broken for one in findings)
    if n_broken:
        console.print(f"\n[bold red]{n_broken} broken[/]: do what stands after -> and run this again")
    else:
        console.print("\n[bold green]ready to train[/]: llava-train train --config STAGE.yaml")
