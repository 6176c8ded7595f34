"""How the commands of `llava-train` read their options and show them, on top of typer."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from llava_train.many_values import FLAGS, repeat_flags

SETTINGS = {"help_option_names": ["-h", "--help"]}

TRAIN = "Train"
LOOK = "Look at data and plans"
USE = "Use a model"
MEASURE = "Measure and hand on"
MACHINE = "About this machine"
"""Headings of `llava-train --help`, in the order of the commands."""


class Command(TyperCommand):
    """A command whose `--config` and `--set` take all values up to the next option, where they take several at all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        return super().parse_args(ctx, list(repeat_flags(args, several.intersection(FLAGS))))

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """All commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _flags_without_type(super().get_params(ctx))


def _flags_without_type(params: list[Any]) -> list[Any]:
    """That a flag is a truth value need not take a column of the help."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
