"""`llava-train --help`, its examples, shell completion, and how soon they are there."""

from __future__ import annotations

import gc
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from llava_train import __version__
from llava_train.cli import _uncollected, app
from llava_train.cli_help import LOOK, MACHINE, MEASURE, TRAIN, USE
from tests.train.helpers import ROOT

GROUP: Any = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
WIDTH = 80


def shown(*arguments: str, width: int = WIDTH) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": str(width)}, prog_name="llava-train")
    return done.output


def examples(command: str) -> list[str]:
    """The command lines in the help of a command, with continued lines joined."""
    text = inspect.cleandoc(GROUP.commands[command].help).replace("\\\\\n", " ").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r" *llava-train ", line)]


def completions(line: str, shell: str = "bash") -> list[str]:
    """What a shell is told after a command line, in this process."""
    words = f"{line}|".split(" ")  # the bar keeps an empty last word
    instructions = {"_LLAVA_TRAIN_COMPLETE": f"complete_{shell}"}
    instructions |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    instructions |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = CliRunner().invoke(app, [], env=instructions, prog_name="llava-train")
    assert done.exit_code == 0, done.output
    return done.stdout.split("\n")[:-1]


def test_help_groups_the_commands_in_the_order_of_a_users_work() -> None:
    text = shown("--help")
    headings = [line for line in (TRAIN, LOOK, USE, MEASURE, MACHINE) if f"─ {line} ─" in text]
    assert headings == [TRAIN, LOOK, USE, MEASURE, MACHINE]
    assert sorted(headings, key=text.index) == headings
    assert "─ Commands ─" not in text, "a command without a heading"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_80_columns_and_explains_every_option(command: str) -> None:
    text = shown(command, "--help")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" not in text, "cut off"
    options = [param for param in GROUP.commands[command].params if not param.hidden]
    assert [param.name for param in options if not (param.help or "").endswith(".")] == []
    for option in options:
        assert not option.opts[0].startswith("--") or option.opts[0] in text, "cut off"
    longest = max(inspect.cleandoc(GROUP.commands[command].help).split("\n\n", 1)[1].splitlines(), key=len)
    assert len(longest) <= WIDTH - 2, f"breaks in the middle: {longest}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_command_are_ones_that_it_takes(command: str) -> None:
    found = examples(command)
    assert found
    for line in found:
        program, name, *arguments = shlex.split(line.partition(" > ")[0])
        assert (program, name) == ("llava-train", command)
        GROUP.commands[command].make_context(name, arguments)


def test_an_example_with_a_wrong_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option: --gpu"):
        GROUP.commands["plan"].make_context("plan", ["--config", "a.yaml", "--gpu", "8"])


def test_several_values_after_one_flag_where_a_command_takes_several() -> None:
    parsed = GROUP.commands["check"].make_context("check", ["--config", "a.yaml", "--set", "seed=1", "batch.size=2"])
    assert parsed.params["set_"] == ["seed=1", "batch.size=2"]
    assert "unexpected extra argument" in shown("plan", "--config", "a.yaml", "b.yaml")


def test_lmms_evals_own_spelling_of_its_options_is_taken() -> None:
    arguments = ["RUN", "--tasks", "mme", "--output_path=out", "--model_args", "dtype=float32", "--log_samples"]
    context = GROUP.commands["lmms-eval"].make_context("lmms-eval", arguments)
    assert (str(context.params["output_path"]), context.params["model_args"]) == ("out", "dtype=float32")
    assert context.args == ["--log_samples"]


def test_the_version_is_told() -> None:
    assert shown("--version") == f"llava-train {__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "near"), [(["plam"], "Did you mean 'plan'?"), (["plan", "--confg", "a.yaml"], "--config")]
)
def test_a_mistyped_word_is_answered_with_the_near_one(wrong: list[str], near: str) -> None:
    assert near in shown(*wrong)


def test_the_deepspeed_launchers_own_option_is_taken_before_the_command() -> None:
    assert "Stage files" in shown("--local_rank=0", "train", "--help")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell: str) -> None:
    assert any("evaluate" in line for line in completions("llava-train ev", shell))
    options = " ".join(completions("llava-train train --config a.yaml b.yaml --s", shell))
    assert {"--set", "--stop-file", "--suffix"} <= set(re.findall(r"--[\w-]+", options))
    assert "--config" not in options


def test_a_shell_completes_the_choices_of_an_option() -> None:
    assert completions("llava-train slurm --launcher s") == ["srun"]


@pytest.mark.parametrize(
    "line", ["llava-train train --config ", "llava-train train --config a.yaml ", "llava-train ask "]
)
def test_a_shell_completes_files_where_we_have_nothing_to_say(line: str) -> None:
    assert completions(line) == [""]
    assert completions(line, "zsh") == ["_files"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_llava_train(shell: str) -> None:
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "llava_train", "--show-completion", shell],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_LLAVA_TRAIN_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.parametrize("module", ["llava_train", "llava_train.cli"])
def test_an_import_brings_no_library_that_takes_long(module: str) -> None:
    heavy = "{'torch', 'transformers', 'deepspeed', 'datasets', 'wandb'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(sorted({heavy}))"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_imports_in_a_process_of_others_keep_nothing_of_theirs_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)  # it is here already, as in a notebook
    n_frozen = gc.get_freeze_count()
    with _uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() == n_frozen


@pytest.mark.parametrize("n_characters", [1, 1_000_000])
def test_output_that_cannot_be_written_ends_a_command_with_one_message(n_characters: int) -> None:
    program = f"from llava_train.errors import user_errors\nwith user_errors():\n    print('x' * {n_characters})"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "error: " in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
