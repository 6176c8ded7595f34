"""How the commands of `llava-train` read their options and show them, on top of typer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from llava_train.many_values import FLAGS, repeat_flags
from llava_train.user_paths import PathError, expand

SETTINGS = {"help_option_names": ["-h", "--help"]}

TRAIN = "Train"
LOOK = "Look at data, plans and runs"
USE = "Use a model"
MEASURE = "Measure and hand on"
MACHINE = "About this machine"
"""Headings of `llava-train --help`, in the order of the commands."""


def expanded(text: str) -> str:
    """Return a path, or the name of a model, with `~` replaced; for `parser=` of options that are no `Path`."""
    try:
        return expand(text)
    except PathError as error:
        raise typer.BadParameter(str(error)) from None


class Command(TyperCommand):
    """A command whose `--config` and `--set` take all values up to the next option, where they take several at all.

    In values that are a `Path`, `~` is replaced: a shell leaves it in quotes and in `--out=~/page.html`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        rest = super().parse_args(ctx, list(repeat_flags(args, several.intersection(FLAGS))))
        ctx.params = {name: _expanded_paths(value) for name, value in ctx.params.items()}
        return rest

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


def _expanded_paths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded_paths(each) for each in value)
    return Path(expanded(str(value))) if isinstance(value, Path) else value


def _flags_without_type(params: list[Any]) -> list[Any]:
    """That a flag is a truth value need not take a column of the help."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
