"""What is looked at in commands that are not run. A check gets the arguments and returns what is wrong, or None."""

from __future__ import annotations

import configparser
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer.main
from packaging.requirements import InvalidRequirement, Requirement

from tests.scripts import ROOT

Check = Callable[[Sequence[str], Path], str | None]
"""From a command's words and the folder it stands in to what is wrong with it."""


def nothing(words: Sequence[str], cwd: Path) -> str | None:
    return None


def file_exists(words: Sequence[str], cwd: Path) -> str | None:
    """Every word that looks like a file of the checkout is one."""
    missing = [word for word in words[1:] if word.endswith((".py", ".sh", ".sbatch")) and not (cwd / word).is_file()]
    return f"no such file: {', '.join(missing)}" if missing else None


def shell_script(words: Sequence[str], cwd: Path) -> str | None:
    read = subprocess.run(["/bin/bash", "-n", *words[1:2]], cwd=cwd, capture_output=True, text=True, check=False)
    return read.stderr or None


def named_folders(words: Sequence[str], cwd: Path) -> str | None:
    missing = [
        word for word in words[1:] if word.strip("./").startswith(("runs", "notebooks")) and not (cwd / word).exists()
    ]
    return f"no such folder: {', '.join(missing)}" if missing else None


def pip_install(words: Sequence[str], cwd: Path) -> str | None:
    """Constraint files exist, extras of the checkout are in setup.cfg, the rest are requirements."""
    after_flag = False
    for flag, word in zip(["", *words], words, strict=False):
        if not after_flag:
            after_flag = word == "install"
        elif flag in ("-c", "-r"):
            if not (cwd / word).is_file():
                return f"no such file: {word}"
        elif word.startswith("."):
            asked = set(filter(None, word.removeprefix(".").strip("[]").split(",")))
            if unknown := asked - set(extras()):
                return f"no such extra: {', '.join(sorted(unknown))}"
        elif not word.startswith("-"):
            try:
                named = Requirement(word)
            except InvalidRequirement as error:
                return f"{word}: {error}"
            if named.name.replace("-", "_") == "llava_train" and (unknown := named.extras - set(extras())):
                return f"no such extra: {', '.join(sorted(unknown))}"
    return None


def extras() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return list(setup["options.extras_require"])


def llava_train(words: Sequence[str], cwd: Path) -> str | None:
    """The command's own parser takes the arguments."""
    from llava_train.cli import app

    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("llava-train", list(words[1:]))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except Exception as error:  # whatever its parser raises
        return f"{type(error).__name__}: {getattr(error, 'message', error)}"
    return None


def sbatch(words: Sequence[str], cwd: Path) -> str | None:
    return file_exists(words, cwd)


def named(words: Sequence[str], cwd: Path) -> str | None:
    """A command that is only named exists, and so do its options."""
    if words[0] != "llava-train":
        return file_exists(words, cwd)
    from llava_train.cli import app

    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    _, name, *options = words
    if name == "--help" or name.startswith("--") and "completion" in name:
        return None
    if name not in commands:
        return f"no such command: llava-train {name}"
    known = [option for parameter in commands[name].params for option in parameter.opts] + ["--help"]
    unknown = [option for option in options if option not in known]
    return f"no such option: llava-train {name} {unknown[0]}" if unknown else None
