"""The page of the reference about `llava-train`, of the commands themselves (typer writes it)."""

from __future__ import annotations

import re

import typer.cli
import typer.main

from llava_train.cli import app

_LIST = re.compile(r"\*\*Commands\*\*:\n\n(- .*\n)+")
"""It cuts the words of a command short; the table of contents beside the page lists them, too."""
_EXAMPLE = re.compile(r"^(Examples?): (llava-train .+)$", re.MULTILINE)


def command_line_page() -> str:
    """Markdown: a section a command, with its arguments and options, and its examples as code."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="llava-train")
    page = typer.cli.get_docs_for_click(obj=command, ctx=context, name="llava-train", title="Command line")
    page = page.replace("\n* `", "\n- `")
    page = _LIST.sub("", page)
    return _EXAMPLE.sub(r"\1:\n\n```bash\n\2\n```", page)
