"""What a finished run has left, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

from llava_train.config import StageConfig
from llava_train.model.foreign_files import ADAPTER_FOLDER
from llava_train.model.weights import PROJECTOR_FILE, RESULT_FOLDER
from llava_train.run_files import ANSWERS_FILE, REPORT_FILE, read_records
from llava_train.train.checkpoint import CHECKPOINTS_FOLDER, complete_checkpoints


def written(config: StageConfig) -> Iterator[tuple[str, str]]:
    """A label and a text for each thing that is in the run's folder beside the result."""
    run = config.run_dir
    if (run / ADAPTER_FOLDER).is_dir():
        yield "adapter", f"{run / ADAPTER_FOLDER}: LoRA's weights by themselves, for peft"
    if checkpoints := complete_checkpoints(run / CHECKPOINTS_FOLDER):
        steps = ", ".join(f"{int(path.name.removeprefix('step-')):,}" for path in reversed(checkpoints))
        yield "checkpoints", f"{run / CHECKPOINTS_FOLDER}: after step {steps}"
    if (run / REPORT_FILE).is_file():
        yield "report", str(run / REPORT_FILE)


def next_commands(config: StageConfig, file: Path) -> list[str]:
    """What a person would do now.

    Args:
        file: the stage file of the run.
    """
    run = config.run_dir
    if holds_projector_only(run):
        found = stages_from(config, file.parent)
        named = [_arguments(path, config) for path in found] or [f"STAGE2.yaml   # with init_from: {run}"]
        return [f"llava-train train --config {arguments}" for arguments in named]
    picture, question = a_question(run)
    asked = " ".join(shlex.quote(word) for word in (str(run), picture, question))
    return [f"llava-train ask {asked}", f"llava-train report {shlex.quote(str(run))}"]


def holds_projector_only(run: Path) -> bool:
    """Whether the result is that of a stage 1, which another stage continues."""
    return (run / RESULT_FOLDER / PROJECTOR_FILE).is_file()


def stages_from(config: StageConfig, folder: Path) -> list[Path]:
    """The stage files of a folder that start from a run, which they name or whose path they give."""
    starts = (config.name, str(config.run_dir))
    return [path for path in sorted(folder.glob("*.yaml")) if _value(path, "init_from") in starts]


def a_question(run: Path) -> tuple[str, str]:
    """A picture that the run was asked about, and the question; words in their place where there is none."""
    for record in read_records(run / ANSWERS_FILE):
        question = record["prompt"].replace("<image>", "").strip()
        if len(record.get("pictures", ())) == 1 and question.isprintable():
            return str(run / record["pictures"][0]), question
    return "PICTURE", "What is in this picture?"


def _arguments(path: Path, config: StageConfig) -> str:
    """A stage file that starts from a run, and the `output` of that run where the file has another one."""
    quoted, output = shlex.quote(str(path)), _value(path, "output") or "runs"
    is_same = Path(output).resolve() == Path(config.output).resolve()
    return quoted if is_same else f"{quoted} --set {shlex.quote(f'output={config.output}')}"


def _value(path: Path, key: str) -> str | None:
    """A path that a stage file gives, with `~` replaced."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(Path(content[key]).expanduser())
    except (OSError, ValueError, RuntimeError, yaml.YAMLError, KeyError, TypeError):
        return None
