"""The commands of `llava-train` that look at runs and machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_train.errors import user_errors
from llava_train.run_files import REPORT_FILE

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the run; of several, compare.html.")] = None,
) -> None:
    """Write a page of a run: curves, answers, speed, what was left out. A run that goes on has one too.

    Example: llava-train report runs/a runs/b --out compare.html
    """
    with user_errors():
        from llava_train.report.page import write_report

        path = out or (runs[0] / REPORT_FILE if len(runs) == 1 else Path("compare.html"))
        for record in write_report(runs, path):
            for note in record.notes:
                print(f"note: {record.folder}: {note}", file=sys.stderr)
        print(f"wrote {path}")
