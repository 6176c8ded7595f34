"""The `llava-train` command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from llava_train import cli_judge, cli_use
from llava_train.config import StageConfig
from llava_train.errors import UserError, user_errors
from llava_train.launch import is_first
from llava_train.many_values import ManyValues
from llava_train.slurm import SCRIPT, Job, Launcher, SubmitError, prepare, submit, what_to_know
from llava_train.stage_file import ConfigError, load_stage, stage_schema, with_suffix
from llava_train.train.chatter import turn_down, turn_up
from llava_train.train.terminal import Waiting

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Train LLaVA models in two stages.")
app.registered_commands += cli_use.app.registered_commands + cli_judge.app.registered_commands

ConfigFile = Annotated[Path, typer.Option("--config", help="Stage file.")]
ConfigFiles = Annotated[list[Path], typer.Option("--config", help="Stage files, run in this order.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example batch.size=64.")]


@app.callback()
def quiet(context: typer.Context) -> None:
    if context.invoked_subcommand not in ("train", "lmms-eval"):  # the one asks first, the other shows another program
        turn_down(is_first(os.environ))


@app.command(cls=ManyValues)
def train(
    config: ConfigFiles,
    set_: Overrides = None,
    stop_file: Annotated[Path | None, typer.Option(help="Save and exit with code 85 when this file appears.")] = None,
    suffix: Annotated[str, typer.Option(help="Name each run NAME-SUFFIX.")] = "",
    allow_config_change: Annotated[bool, typer.Option(help="Go on though stage file or data changed.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what libraries say, too.")] = False,
) -> None:
    """Run stages in order; start, resume and finish are this same command."""
    raise SystemExit(run(config, set_ or [], stop_file, suffix, allow_config_change, verbose))


@app.command(cls=ManyValues)
def slurm(
    config: Annotated[list[str], typer.Option("--config", help="Stage files, run in this order.")],
    set_: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs a node, with one rank each.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="For nodes without GPUs.")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="Default: loader.workers + 1.")] = None,
    time: Annotated[str | None, typer.Option(help="24:00:00; the job saves and requeues itself before.")] = None,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    array: Annotated[str | None, typer.Option(help="0-3: a run a task; {task} in --set is its number.")] = None,
    launcher: Annotated[
        Launcher, typer.Option(help="torchrun on each node, or one srun task a rank.")
    ] = Launcher.torchrun,
    setup: Annotated[str | None, typer.Option(help="Shell commands first. Default: this Python environment.")] = None,
    container: Annotated[str | None, typer.Option(help="A .sif for apptainer, or an image for pyxis.")] = None,
    signal_before: Annotated[int, typer.Option(min=1, help="Seconds before the end of the time to save.")] = 120,
    max_requeues: Annotated[int, typer.Option(min=0, help="The job requeues itself so many times.")] = 100,
    job_name: Annotated[str | None, typer.Option(help="Default: the name of the first stage.")] = None,
    sbatch_arg: Annotated[list[str] | None, typer.Option(help="More for sbatch: --sbatch-arg=--exclusive")] = None,
    srun_arg: Annotated[list[str] | None, typer.Option(help="More for srun.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job; submit nothing.")] = False,
) -> None:
    """Submit stages to SLURM, as a job that saves before it is preempted and requeues itself.

    Example: llava-train slurm --config stage1.yaml stage2.yaml --nodes 4 --gpus 8 --time 24:00:00
    """
    with user_errors():
        job = Job(
            nodes,
            gpus,
            ranks_per_node,
            cpus_per_rank,
            time,
            partition,
            account,
            qos,
            array,
            launcher,
            setup,
            container,
            signal_before,
            max_requeues,
            job_name,
            tuple(sbatch_arg or ()),
            tuple(srun_arg or ()),
        )
        if not SCRIPT.is_file():
            raise SubmitError(f"{SCRIPT} is missing: install the package from a checkout, by pip install -e .")
        submission = prepare(job, config, set_ or [])
        if dry_run:
            print(f"{submission}\n\n{SCRIPT.read_text(encoding='utf-8')}")
        else:
            print(what_to_know(submission, submit(submission)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a stage file, for editors."""
    print(json.dumps(stage_schema(), indent=2))


@app.command()
def check(
    config: ConfigFile,
    set_: Overrides = None,
    fast: Annotated[bool, typer.Option(help="Read the headers of pictures only.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    write_clean: Annotated[Path | None, typer.Option(help="Write what can be trained on to this JSONL file.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="GPUs to estimate the packing for.")] = 1,
) -> None:
    """Read all the data of a stage and report what would be lost; exit code 1 when something would.

    Example: llava-train check --config stage2.yaml --write-clean clean.jsonl
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.check import check_data
        from llava_train.inspect.clean import clean_files
        from llava_train.inspect.clean import write_clean as write_clean_records
        from llava_train.inspect.opening import open_stage_data
        from llava_train.inspect.report import print_report, summary

        data = open_stage_data(stage)
        _say_note(data.note)
        files = clean_files(data, write_clean) if write_clean else []
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
            checked = check_data(stage, data, not fast, workers or os.cpu_count() or 1, ranks, progress)
        found = summary(stage, data, checked)
        found["clean"] = write_clean_records(stage, data, checked, files) if files else []
        if json_:
            print(json.dumps(found, ensure_ascii=False))
        else:
            print_report(Console(soft_wrap=True), found)
        raise SystemExit(1 if checked.would_lose else 0)


@app.command()
def preview(
    config: ConfigFile,
    set_: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many samples.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures and packs too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a line of JSON a sample.")] = False,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="GPUs to show the packs for.")] = 1,
) -> None:
    """Show what the model will see of the first samples of a stage.

    Example: llava-train preview --config stage2.yaml --html preview.html
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.opening import open_stage_data
        from llava_train.inspect.preview import first_seen, for_page, print_seen, write_page

        data = open_stage_data(stage)
        _say_note(data.note)
        console, shown = Console(soft_wrap=True), []
        for one in first_seen(stage, data, n):
            if html:
                shown.append(for_page(one, data.preprocessor))
            if json_:
                print(json.dumps(one.as_record(), ensure_ascii=False))
            else:
                print_seen(console, one)
        if html:
            write_page(stage, data, shown, ranks, html)
            print(f"wrote {html}", file=sys.stderr)


@app.command(cls=ManyValues)
def plan(
    config: ConfigFile,
    set_: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, over all nodes.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of one GPU.")] = "80G",
    device: Annotated[str, typer.Option(help="Which GPU, for the hours.")] = "H100",
    tflops: Annotated[float | None, typer.Option(min=0, help="Its peak, in place of the datasheet's.")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that a run uses.")] = 0.4,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell what a stage will take: memory, packs, steps, hours. Needs no GPU and no weights; exit code 1: does not fit.

    Example: llava-train plan --config stage2.yaml --gpus 8 --memory 80G
    """
    with user_errors():
        stage = load_stage(config, set_ or [])
        from llava_train.inspect.plan import as_record, bytes_of, make_plan
        from llava_train.inspect.plan_table import print_plan

        made = make_plan(stage, gpus, bytes_of(memory), device, tflops, mfu)
        if json_:
            print(json.dumps(as_record(made)))
        else:
            print_plan(Console(soft_wrap=True), made)
        raise SystemExit(0 if made.fits else 1)


def _say_note(note: str | None) -> None:
    if note:
        print(note, file=sys.stderr)


def run(
    paths: list[Path],
    overrides: list[str],
    stop_file: Path | None = None,
    suffix: str = "",
    allow_config_change: bool = False,
    verbose: bool = False,
) -> int:
    """Reads all stage files, then runs the stages.

    Returns:
        The exit code: 2 for what the user can mend, 85 after a request to stop (the same command goes on), 86 (by the
        watchdog) when a rank hangs, 130 after Ctrl-C, as in a shell.
    """
    is_main = is_first(os.environ)
    waiting = Waiting(is_main)
    if not verbose:
        turn_down(is_main)
    try:
        stages = [load_stage(path, overrides) for path in paths]
        if suffix:
            stages = with_suffix(stages, suffix)
        _check_chain(stages)
        waiting.show("loading PyTorch and DeepSpeed")
        # Not before the files are known to be right: these imports take seconds.
        from llava_train.train.finished import next_commands
        from llava_train.train.interrupt import EXIT_RESUBMIT, Preempted, StopRequests
        from llava_train.train.session import Session, StartClock
        from llava_train.train.stage import run_stage
        from llava_train.train.world import guarded, start_distributed

        if verbose:
            turn_up()
        timeout_s = max(stage.engine.hang_timeout_s for stage in stages)
        with StopRequests([stop_file] if stop_file else []) as stop:
            clock = StartClock()
            clock.mark("imports")
            with guarded(start_distributed(timeout_s), timeout_s) as world:
                clock.mark("processes")
                session = Session(world, stop, allow_config_change, verbose, clock, waiting)
                try:
                    for stage in stages:
                        run_stage(stage, session)
                except Preempted as preempted:
                    world.say(str(preempted))
                    return EXIT_RESUBMIT
                world.say("\n".join(["next:", *(f"  {command}" for command in next_commands(stages[-1], paths[-1]))]))
    except UserError as error:
        if is_main or not error.on_every_rank:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main:
            print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    finally:
        waiting.stop()
    return 0


def _check_chain(stages: list[StageConfig]) -> None:
    names = [stage.run_dir for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"two stages share a run folder: {', '.join(map(str, names))}; give each its own name")
