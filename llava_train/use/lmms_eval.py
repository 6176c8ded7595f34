"""Runs the lmms-eval package on a model: `python -m lmms_eval --model llava_hf`, in an environment that has it.

lmms-eval wants versions that a training environment cannot have (wandb, av, filelock), so it mostly lives in one of its
own. A model is read there by plain transformers, and a task of ours by plain `datasets` and Pillow.

    OUTPUT/MODEL/*_results.json, *_samples_*.jsonl   what lmms-eval writes
           tasks/                                    files of questions, made into tasks
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_train.errors import UserError
from llava_train.files import is_hub_id
from llava_train.model.foreign_files import ADAPTER_CONFIG, NON_LORA_FILE, Kind, kind_of
from llava_train.model.weights import ADAPTER_FOLDER, RESULT_FOLDER

_FILES_OF_QUESTIONS = (".json", ".jsonl", ".gz", ".parquet", ".arrow")
_PROBE = """
import importlib, json
missing = []
for name in ("lmms_eval", "decord", "filelock._api"):
    try:
        importlib.import_module(name)
    except ImportError:
        missing.append(name)
print(json.dumps({"missing": missing, "cuda": not missing and importlib.import_module("torch").cuda.is_available()}))
"""
_INSTALL = '''python -m venv lmms-env && lmms-env/bin/pip install lmms-eval decord "filelock<4.3"'''
"""lmms-eval 0.7.3 does not tell pip that it imports decord, and a module that filelock 4.3 no longer has."""


class LmmsEvalError(UserError):
    """lmms-eval cannot be run. The message says what to do."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how."""

    model: str
    """Run folder, its `model/`, an exported folder, or a hub id."""
    tasks: tuple[str, ...]
    """Names of tasks of lmms-eval, and files of questions."""
    output: Path
    images: Path | None = None
    """Pictures of the files of questions; None for the folder of each."""
    python: str | None = None
    """Of the environment that has lmms-eval; None for this one."""
    device: str | None = None
    """cuda, cuda:1 or cpu; None for cuda where it is."""
    gpus: int = 1
    """Each of several GPUs answers a share of the questions."""
    model_args: str = ""
    """More for lmms-eval's `--model_args`."""
    more: tuple[str, ...] = ()
    """More for lmms-eval, as it is."""


def evaluate(evaluation: Evaluation) -> int:
    """Makes tasks of files of questions, and runs lmms-eval, which prints its table; returns its exit code.

    lmms-eval catches what goes wrong in an evaluation and ends with 0; then this returns 1.

    Raises:
        LmmsEvalError: no lmms-eval in that environment, no such model, or options that contradict each other.
        TaskError: a file of questions that cannot become a task.
    """
    own_device = _device_of(evaluation.python or sys.executable)
    device = evaluation.device or own_device
    model = find_model(evaluation.model)
    tasks, folder = write_tasks(evaluation.tasks, evaluation.images, evaluation.output / "tasks")
    called = command(evaluation, str(model), device, tasks, folder)
    print(shlex.join(called), file=sys.stderr)
    before = _results(evaluation.output)
    code = subprocess.run(called, check=False).returncode
    written = sorted(_results(evaluation.output) - before)
    for path in written:
        print(f"results: {path}", file=sys.stderr)
    if not code and not written:
        print("error: lmms-eval wrote no results; what went wrong stands above", file=sys.stderr)
    return code if code or written else 1


def find_model(name: str) -> Path | str:
    """The folder with the model's files, or a hub id.

    Raises:
        LmmsEvalError: no model, or one that llava_hf would not read, or would read without its adapter.
        ForeignError: a folder that holds something else.
    """
    folder = Path(name)
    if (folder / RESULT_FOLDER).is_dir():
        folder = folder / RESULT_FOLDER
    if (folder / "config.json").is_file() or (folder / NON_LORA_FILE).is_file():
        _check_model(folder)
        return folder.absolute()
    if is_hub_id(name):
        return name
    raise LmmsEvalError(
        f"{name} holds no model (config.json); name the folder of a finished stage 2, an exported one, or a hub id"
    )


def _check_model(folder: Path) -> None:
    if (kind := kind_of(folder)) is not Kind.TRANSFORMERS:
        raise LmmsEvalError(
            f"{folder} is {kind.value}, which lmms-eval's llava_hf cannot read; run `llava-train export {folder} OUT` "
            "and name OUT"
        )
    if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file():
        raise LmmsEvalError(
            f"{folder} has its LoRA adapter in {ADAPTER_FOLDER}/, which lmms-eval would leave out; run `llava-train "
            "export --merge-lora` on the run, and name what that writes"
        )


def write_tasks(tasks: Iterable[str], images: Path | None, folder: Path) -> tuple[list[str], Path | None]:
    """Makes tasks of the files of questions among `tasks`; returns all names, and `folder` if it has tasks now.

    Raises:
        LmmsEvalError: a file that is missing, or two that would have the same name.
        TaskError: a file of questions that cannot become a task.
    """
    names: list[str] = []
    own: set[str] = set()
    for task in tasks:
        name = task
        if task.endswith(_FILES_OF_QUESTIONS):
            if not Path(task).is_file():
                raise LmmsEvalError(f"--tasks: there is no file {task}")
            from llava_train.use.lmms_task import write_task

            name = write_task(Path(task), images, folder)
            if name in own:
                raise LmmsEvalError(f"--tasks: two files would become the task {name}; rename one")
            own.add(name)
        names.append(name)
    return names, folder if own else None


def command(
    evaluation: Evaluation, model: str, device: str, tasks: Sequence[str], include_path: Path | None
) -> list[str]:
    """The command that runs lmms-eval on a model. Raises LmmsEvalError."""
    if "," in model:
        raise LmmsEvalError(f"lmms-eval takes no path with a comma: {model}; rename or link the folder")
    if include_path and any(option.startswith("--include_path") for option in evaluation.more):
        raise LmmsEvalError("lmms-eval has one --include_path, which a file of questions takes; run them one by one")
    if evaluation.gpus > 1 and not device.startswith("cuda"):
        raise LmmsEvalError(f"--gpus {evaluation.gpus}: the environment that runs lmms-eval sees no GPU")
    called = [evaluation.python or sys.executable, "-m"]
    if evaluation.gpus > 1:
        called += ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={evaluation.gpus}", "-m"]
    # Without a device map llava_hf takes one GPU a process, and fails where there is one process.
    device_map = f"device_map={device}" if evaluation.gpus == 1 else ""
    model_args = ",".join(filter(None, [f"pretrained={model}", device_map, evaluation.model_args]))
    called += ["lmms_eval", "--model", "llava_hf", "--model_args", model_args]
    called += ["--tasks", ",".join(tasks), "--device", device, "--batch_size", "1"]  # llava_hf takes no other
    called += ["--output_path", str(evaluation.output), "--log_samples"]
    if include_path:
        called += ["--include_path", str(include_path.absolute())]
    return called + list(evaluation.more)


def _device_of(python: str) -> str:
    """The device that an environment computes on. Raises LmmsEvalError where it lacks lmms-eval."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LmmsEvalError(f"--python {python}: {error.strerror}") from error
    if done.returncode:
        raise LmmsEvalError(f"{python} fails: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["missing"]:
        raise LmmsEvalError(
            f"{python} lacks {', '.join(found['missing'])}. lmms-eval needs other versions than training, so give it "
            f"an environment of its own:\n  {_INSTALL}\nand name that: --python lmms-env/bin/python"
        )
    return "cuda" if found["cuda"] else "cpu"


def _results(output: Path) -> set[Path]:
    return set(output.glob("*/*_results.json"))
