"""The `llava-train` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_train.config import StageConfig
from llava_train.errors import UserError
from llava_train.stage_file import ConfigError, load_stage, stage_schema

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Train LLaVA models in two stages.")

ConfigFiles = Annotated[list[Path], typer.Option("--config", help="Stage files, run in this order.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example batch.size=64.")]


@app.command()
def train(config: ConfigFiles, set_: Overrides = None) -> None:
    """Run stages in order; start, resume and finish are this same command."""
    raise SystemExit(run(config, set_ or []))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a stage file, for editors."""
    print(json.dumps(stage_schema(), indent=2))


@app.command()
def ask(model: Path, image: Path, question: str, max_new_tokens: int = 128) -> None:
    """Ask a trained model about a picture."""
    from llava_train.use.ask import answer_question

    try:
        print(answer_question(model, image, question, max_new_tokens))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run(paths: list[Path], overrides: list[str]) -> int:
    """Reads all stage files, then runs the stages.

    Returns:
        The exit code: 2 for what the user can mend, 130 after Ctrl-C, as in a shell.
    """
    try:
        stages = [load_stage(path, overrides) for path in paths]
        _check_chain(stages)
        # Not before the files are known to be right: these imports take seconds.
        from llava_train.train.engine import start_distributed
        from llava_train.train.stage import run_stage

        world = start_distributed()
        for stage in stages:
            run_stage(stage, world)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _check_chain(stages: list[StageConfig]) -> None:
    names = [stage.run_dir for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"two stages share a run folder: {', '.join(map(str, names))}; give each its own name")
