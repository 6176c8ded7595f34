"""The commands of `llava-train` about runs and the machine that they run on."""

from __future__ import annotations

import sys
from itertools import chain, count
from pathlib import Path
from typing import Annotated

import typer

from llava_train.cli_help import LOOK, MACHINE, Command
from llava_train.errors import UserError, user_errors
from llava_train.run_files import REPORT_FILE

app = typer.Typer()


@app.command(cls=Command, rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Default: report.html in the run; of several runs, ./compare.html, or a name that is free.",
        ),
    ] = None,
) -> None:
    """Write a page about a run, or one that compares several.

    Curves, answers to held-out questions before and after training, speed, and
    what was left out. A run leaves such a page when it ends; this also makes one
    of a run that still goes on. Needs no GPU.

    Example:
      llava-train report runs/llava-1.5-7b-stage2
      llava-train report runs/a runs/b --out compare.html
    """
    with user_errors():
        from llava_train.report.page import write_report

        path = out or (runs[0] / REPORT_FILE if len(runs) == 1 else _free("compare"))
        if path.is_dir():
            raise UserError(f"--out {path}: a folder; name a file, such as {path / 'compare.html'}")
        for record in write_report(runs, path):
            for note in record.notes:
                print(f"note: {record.folder}: {note}", file=sys.stderr)
        print(f"wrote {path}")


def _free(stem: str) -> Path:
    """A page that is not there yet: an earlier comparison stays."""
    names = (Path(f"{stem}-{number}.html") for number in count(2))
    return next(path for path in chain([Path(f"{stem}.html")], names) if not path.exists())


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

    with user_errors():
        raise SystemExit(examine(json_))
