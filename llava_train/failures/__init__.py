"""What an exception means to the user: `explain` knows the failures of libraries and machines. Needs no torch.

It goes by the types of an exception and of those that it came from; by texts only where a library has no type for it.
A class is looked up in the modules that are loaded: what was not imported has raised nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from llava_train.failures import hub, machine, processes, weights
from llava_train.failures.words import Context, Explanation, chain, first_lines

_KINDS = (processes.of_other_rank, *hub.KNOWN, *machine.KNOWN, *processes.KNOWN, *weights.KNOWN)


def explain(error: BaseException, context: Context | None = None) -> Explanation | None:
    """The failure that an exception, or one of those that it came from, tells of; None for one that is not known."""
    context = context or Context()
    for link in chain(error):
        for known in _KINDS:
            if found := known(link, context):
                return found
    return None


def cannot_load(key: str, name: object, error: BaseException) -> str:
    """Why what a key of a stage file names cannot be loaded, in words that say what to do."""
    return f"{key}: cannot load {name}: {reason(error, name)}"


def reason(error: BaseException, name: object = "") -> str:
    """A failure in words: explained, or else the first lines of what its library says."""
    return str(explain(error, Context(subject=str(name))) or first_lines(error))


def file_trouble(error: OSError) -> str:
    """What the file system refused, and what to do."""
    found = explain(error) or explain_file(error, Context())
    subject = f"{found.subject}: " if found and found.subject else ""
    return f"{subject}{found or first_lines(error)}"


def explain_file(error: BaseException, context: Context) -> Explanation | None:
    """An error of the file system that names its file, whatever it is."""
    return next((found for link in chain(error) if (found := machine.named_file(link, context))), None)


def of_command(command: str = "") -> Context:
    """A command, by what a launcher says of this process."""
    return _of_environment(os.environ, command or " ".join(["llava-train", *sys.argv[1:2]]), is_run=False)


def of_run() -> Context:
    """A process of a run, by what a launcher says of it."""
    return _of_environment(os.environ, "its start", is_run=True)


def _of_environment(environment: Mapping[str, str], doing: str, is_run: bool) -> Context:
    def number(default: int, *names: str) -> int:
        found = [environment[name] for name in names if environment.get(name, "").isdecimal()]
        return int(found[0]) if found else default

    return Context(
        number(0, "RANK", "SLURM_PROCID"),
        number(1, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        number(0, "LOCAL_RANK", "SLURM_LOCALID"),
        doing,
        is_run=is_run,
    )
