"""The commands of `llava-train` about runs and the machine that they run on."""

from __future__ import annotations

from typing import Annotated

import typer

from llava_train.cli_help import MACHINE, Command

app = typer.Typer()


@app.command(cls=Command, rich_help_panel=MACHINE)
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, to put into a bug report.")] = False,
) -> None:
    """Look at this machine and this Python, and try a training of one step.

    Prints versions, devices, what optional packages would give, and what to do
    where something is wrong. Exit code 1 when something needed is broken.

    Example:
      llava-train doctor
      llava-train doctor --json > doctor.json
    """
    from llava_train.doctor.report import examine

    raise SystemExit(examine(json_))
