"""The part of the `llava-train` command that uses trained models: ask, chat, export, evaluate, lmms-eval, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llava_train.errors import UserError

app = typer.Typer()


@app.command("lmms-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lmms_eval(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Run folder, its model/, an exported folder, or a hub id.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval and files of questions, with commas between.")],
    images: Annotated[
        Path | None, typer.Option(help="Pictures of the files of questions. Default: the folder of each.")
    ] = None,
    output_path: Annotated[Path, typer.Option("--output-path", "--output_path")] = Path("runs/lmms-eval"),
    python: Annotated[str | None, typer.Option(help="Of the environment with lmms-eval; default: this one.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu. Default: cuda where it is.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the questions.")] = 1,
    model_args: Annotated[str, typer.Option("--model-args", "--model_args", help="dtype=float32 for example.")] = "",
) -> None:
    """Run lmms-eval on a model; other options go to it as they are.

    Example: llava-train lmms-eval runs/NAME --tasks mme,gqa,held_out.json --python lmms-env/bin/python --limit 100
    """
    from llava_train.use.lmms_eval import Evaluation, evaluate

    names = tuple(name.strip() for name in tasks.split(","))
    try:
        code = evaluate(
            Evaluation(model, names, output_path, images, python, device, gpus, model_args, tuple(context.args))
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)
