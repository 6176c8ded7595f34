"""The `llava-train` command: what trains; the other commands stand in `cli_*.py`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llava_train import __version__, cli_judge, cli_look, cli_runs, cli_use
from llava_train.cli_help import SETTINGS, TRAIN, Command, Group, expanded
from llava_train.cli_look import Overrides
from llava_train.config import StageConfig
from llava_train.errors import user_errors
from llava_train.failures import of_run
from llava_train.last_words import goes_on_from, tell
from llava_train.slurm import SCRIPT, Job, Launcher, prepare, submit, what_to_know
from llava_train.stage_file import ConfigError, load_stage, with_suffix
from llava_train.train.chatter import turn_down, turn_up
from llava_train.train.terminal import Waiting, allow_readers_to_leave, drop_unread, write_anything
from llava_train.user_paths import expand

app = typer.Typer(
    cls=Group,
    context_settings=SETTINGS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train LLaVA models in two stages: the projector, then the language model with it.\n\n"
    "A YAML file describes a stage. Start here:\n"
    "  llava-train doctor                       Is this machine ready?\n"
    "  llava-train plan --config stage1.yaml    What will a stage take?\n"
    "  llava-train train --config stage1.yaml stage2.yaml\n\n"
    "`llava-train COMMAND --help` has examples of each command.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llava-train {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """`--local_rank` comes from `deepspeed --module llava_train train ...`; ranks read the environment."""
    write_anything()
    if context.invoked_subcommand != "train":  # a run says why it ends
        allow_readers_to_leave()
    # One asks first, one shows another program, one hands its environment on to a job.
    if context.invoked_subcommand not in ("train", "lmms-eval", "slurm"):
        turn_down(of_run().rank == 0)


@app.command(cls=Command, rich_help_panel=TRAIN)
def train(
    config: Annotated[
        list[Path], typer.Option("--config", metavar="FILE...", help="Stage files, trained in this order.")
    ],
    set_: Overrides = None,
    stop_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save and exit with code 85 as soon as this file exists."),
    ] = None,
    suffix: Annotated[str, typer.Option(metavar="TEXT", help="Name each run NAME-TEXT.")] = "",
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Go on with a run though its stage file or data changed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what libraries say, too.")] = False,
) -> None:
    """Train stages, one after another. The same command starts, resumes and finishes.

    A run is written to OUTPUT/NAME, by the keys `output` and `name` of its stage
    file. Exit codes: 0 done; 1 a failure that nobody foresaw; 2 something that
    you can mend; 85 asked to stop, and saved; 86 a rank hung; 130 Ctrl-C.

    Example:
      llava-train train --config stage1.yaml stage2.yaml
      llava-train train --config stage2.yaml --set batch.max_tokens=8192 seed=1

    On eight GPUs:
      torchrun --nproc_per_node 8 -m llava_train train --config stage1.yaml
      deepspeed --module llava_train train --config stage1.yaml stage2.yaml
    """
    raise SystemExit(run(config, set_ or [], stop_file, suffix, allow_config_change, verbose))


@app.command(cls=Command, rich_help_panel=TRAIN)
def slurm(
    config: Annotated[
        list[str],
        typer.Option("--config", metavar="FILE...", help="Stage files, trained in this order.", parser=expanded),
    ],
    set_: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Nodes of the job.")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="GPUs on each node, with a rank each.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks on each node, where nodes have no GPUs.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPUs of a rank. Default: loader.workers + 1.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Time limit; before it, the job saves and requeues itself.")
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="As sbatch has it.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="As sbatch has it.")] = None,
    qos: Annotated[str | None, typer.Option(metavar="NAME", help="As sbatch has it.")] = None,
    array: Annotated[
        str | None, typer.Option(metavar="0-3", help="A run a task; {task} in --config and --set is its number.")
    ] = None,
    launcher: Annotated[
        Launcher, typer.Option(help="torchrun in one task a node, or srun with one task a rank.")
    ] = Launcher.torchrun,
    setup: Annotated[
        str | None,
        typer.Option(metavar="COMMANDS", help="Shell commands first. Default: activate this Python environment."),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="A .sif file for apptainer, or an image for pyxis.", parser=expanded),
    ] = None,
    signal_before: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="So long before the end of the time the job saves.")
    ] = 120,
    max_requeues: Annotated[int, typer.Option(min=0, metavar="N", help="So many times the job requeues itself.")] = 100,
    job_name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the name of the first stage.")] = None,
    sbatch_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help="More for sbatch: --sbatch-arg=--exclusive; repeatable.")
    ] = None,
    srun_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help="More for srun: --srun-arg=--mpi=none; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job; submit nothing.")] = False,
) -> None:
    """Submit stages to SLURM, as a job that saves before it is preempted and requeues itself.

    Run it on a login node, in the environment that shall train. The answer names
    the job, its log and its runs, and tells how to follow and stop it.

    Example:
      llava-train slurm --config stage1.yaml stage2.yaml --nodes 4 --gpus 8 \\
        --time 24:00:00 --partition gpu --account me
      llava-train slurm --config stage2.yaml --array 0-3 --set seed={task}
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
        submission = prepare(job, config, set_ or [])
        if dry_run:
            print(f"{submission}\n\n{SCRIPT.read_text(encoding='utf-8')}")
        else:
            print(what_to_know(submission, submit(submission)))


_OWN = app.registered_commands
app.registered_commands = [
    *_OWN,
    *cli_look.app.registered_commands,
    *cli_use.app.registered_commands,
    *cli_judge.app.registered_commands,
    *cli_runs.app.registered_commands,
]


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
        The exit code: 1 for a failure that nobody foresaw, 2 for what the user can mend, 85 after a request to stop
        (the same command goes on), 86 (by the watchdog) when a rank hangs, 130 after Ctrl-C, as in a shell.
    """
    write_anything()
    context = of_run()
    waiting = Waiting(context.rank == 0)
    if not verbose:
        turn_down(context.rank == 0)
    try:
        paths = [Path(expand(str(path))) for path in paths]
        stop_file = Path(expand(str(stop_file))) if stop_file else None
        stages = [load_stage(path, overrides) for path in paths]
        if suffix:
            stages = with_suffix(stages, suffix)
        _check_chain(stages)
        context = replace(context, run_dir=stages[0].run_dir)
        waiting.show("loading PyTorch and DeepSpeed")
        # Not before the files are known to be right: these imports take seconds.
        with _uncollected():
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
                        context = replace(context, run_dir=stage.run_dir)
                        run_stage(stage, session)
                except Preempted as preempted:
                    world.say(str(preempted))
                    return EXIT_RESUBMIT
                finally:
                    context = replace(context, doing=world.activity)
                if world.is_main:
                    print("next:", *next_commands(stages[-1], paths[-1]), sep="\n  ", flush=True)
    except Exception as error:
        waiting.stop()
        drop_unread()
        return tell(error, context, verbose)
    except KeyboardInterrupt:
        if context.rank == 0:
            print(f"interrupted; the same command goes on from {goes_on_from(context)}", file=sys.stderr)
        return 130
    finally:
        waiting.stop()
    return 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing is looked through for garbage inside, nor ever after: of imports all stays (2.9 s without, 2.3 s so).

    But where torch is there already, as in a notebook, what others made must not stay with it.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _check_chain(stages: list[StageConfig]) -> None:
    names = [stage.run_dir for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"two stages share a run folder: {', '.join(map(str, names))}; give each its own name")
