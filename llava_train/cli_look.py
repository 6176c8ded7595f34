"""The commands of `llava-train` that look at data, memory and time before a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from llava_train.cli_help import LOOK, Command
from llava_train.errors import user_errors
from llava_train.stage_file import load_stage, stage_schema

app = typer.Typer()

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="Stage file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Keys of the stage files, changed: batch.size=64 seed=1."),
]


@app.command(cls=Command, rich_help_panel=LOOK)
def check(
    config: ConfigFile,
    set_: Overrides = None,
    fast: Annotated[bool, typer.Option("--fast", help="Read only the headers of pictures.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    write_clean: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what can be trained on to this JSONL file.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that read. Default: one a core.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs to estimate the packing for.")] = 1,
) -> None:
    """Read all the data of a stage, held-out samples too, and tell what would be lost.

    Exit code 1 when something would be. The weights of the model are not loaded.

    Example:
      llava-train check --config stage2.yaml
      llava-train check --config stage2.yaml --write-clean good.jsonl
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.check import check_data
        from llava_train.inspect.clean import clean_files
        from llava_train.inspect.clean import write_clean as write_clean_records
        from llava_train.inspect.opening import open_stage_data
        from llava_train.inspect.report import print_report, summary

        data = open_stage_data(stage)
        files = clean_files(stage, data, write_clean) if write_clean else []
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
            checked = check_data(stage, data, not fast, workers or os.cpu_count() or 1, ranks, progress)
        found = summary(stage, data, checked)
        cleaned = write_clean_records(stage, data, checked, files) if files else []
        found["clean"] = [each.section for each in cleaned if each.section]
        found["clean_notes"] = [note for each in cleaned for note in each.notes()]
        if json_:
            print(json.dumps(found, ensure_ascii=False))
        else:
            print_report(Console(soft_wrap=True), found)
        raise SystemExit(1 if checked.would_lose else 0)


@app.command(cls=Command, rich_help_panel=LOOK)
def preview(
    config: ConfigFile,
    set_: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="Samples to show.")] = 8,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page, too, with pictures and packs.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each sample.")] = False,
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs to show the packs for.")] = 1,
) -> None:
    """Show what the model will see of the first samples of a stage, and what it learns to say.

    Tokens with the supervised ones marked, pictures as the encoder gets them, and
    packs. Needs no GPU and no weights.

    Example:
      llava-train preview --config stage2.yaml --html preview.html
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.opening import open_stage_data
        from llava_train.inspect.preview import Seen, first_seen, for_page, print_seen, write_page

        data = open_stage_data(stage)
        seen: Iterable[Seen] = first_seen(stage, data, n)
        if html:  # first, for the reader of what is printed may leave
            seen = list(seen)
            write_page(stage, data, [for_page(one, data.preprocessor) for one in seen], ranks, html)
            print(f"wrote {html}", file=sys.stderr)
        console = Console(soft_wrap=True)
        for one in seen:
            if json_:
                print(json.dumps(one.as_record(), ensure_ascii=False))
            else:
                print_seen(console, one)


@app.command(cls=Command, rich_help_panel=LOOK)
def plan(
    config: ConfigFile,
    set_: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs, over all nodes.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of one GPU. Default: 80G; this machine's for --measure and a CPU."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which GPU, or CPU, for the hours. Default: H100.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0, metavar="TFLOP/S", help="Its peak in engine.precision, in place of the datasheet's."),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, metavar="SHARE", help="Part of the peak that a run uses.")
    ] = 0.4,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few steps on this machine, to no effect, for the hours.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell what a stage will take: memory, packs, steps, hours.

    Needs no GPU and no weights, but for --measure, which trains a few steps.
    If it does not fit, the exit code is 1 and the keys to change are named.

    Example:
      llava-train plan --config stage2.yaml --gpus 8 --memory 80G
      llava-train plan --config stage2.yaml --measure
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.plan import as_record, make_plan
        from llava_train.inspect.plan_machine import machine_of
        from llava_train.inspect.plan_table import print_plan

        machine = machine_of(stage, gpus, memory, device, tflops, measure)
        made = make_plan(stage, gpus, machine.memory, machine.device, tflops, mfu, machine.speed)
        if json_:
            print(json.dumps(as_record(made)))
        else:
            print_plan(Console(soft_wrap=True), made)
        raise SystemExit(0 if made.fits else 1)


@app.command(cls=Command, rich_help_panel=LOOK)
def schema() -> None:
    """Print the JSON Schema of a stage file, for editors.

    An editor that knows it completes keys, explains them and marks wrong ones.

    Example:
      llava-train schema > stage.schema.json
    """
    with user_errors():
        print(json.dumps(stage_schema(), indent=2))
