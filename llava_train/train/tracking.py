"""What a run shows and keeps: progress bar, metrics.jsonl, quarantine.jsonl, bad_steps.jsonl, answers.jsonl, wandb."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llava_train.config import StageConfig
from llava_train.data.loader import BadSample, StepBatch
from llava_train.data.problems import KINDS
from llava_train.files import write_durably
from llava_train.model.trainable import PartSummary
from llava_train.train.world import World
from llava_train.use.metrics import Score, in_words

METRICS_FILE = "metrics.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
BAD_STEPS_FILE = "bad_steps.jsonl"
ANSWERS_FILE = "answers.jsonl"
FILES = (METRICS_FILE, QUARANTINE_FILE, BAD_STEPS_FILE, ANSWERS_FILE)

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found: the held-out loss, samples that it leaves out, answers, and their scores by name."""

    loss: float
    n_bad: int
    answers: tuple[dict[str, str], ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)


class Tracker:
    """Writes a run's records. Only rank 0 shows and logs; every rank may quarantine.

    Args:
        start_step: steps done before; records of later steps, from before an interruption, are dropped.
    """

    def __init__(self, config: StageConfig, world: World, start_step: int, n_steps: int) -> None:
        self.folder, self.world, self.start_step, self.n_steps = config.run_dir, world, start_step, n_steps
        self.console = Console(quiet=not world.is_main, soft_wrap=True)
        self._wandb: Any = None
        self._unwritten: dict[str, list[str]] = {}
        self._warned = False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(config.name, total=n_steps, completed=start_step, line="")
        self.n_bad_before = 0
        """Samples left out before, on rank 0."""
        if world.is_main:
            for name in FILES:
                _drop_after(self.folder / name, start_step)
            self.n_bad_before = len(_records(self.folder / QUARANTINE_FILE))
            self._start_wandb(config)

    def __enter__(self) -> Tracker:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._wandb is not None:
            self._wandb.finish()

    def started(self, parts: Iterable[PartSummary], step: int, passed_over: Iterable[str]) -> None:
        """Shows what trains and where the run stands."""
        self.console.print(parts_table(parts))
        for reason in passed_over:
            self.say(f"passed over {reason}")
        if step:
            self.say(f"resuming after step {step} of {self.n_steps}")

    def say(self, text: str) -> None:
        """Shows a line on rank 0."""
        self.console.print(text, highlight=False, markup=False)

    def step(self, step: int, metrics: Metrics | None = None) -> None:
        """Moves the progress bar to `step`; `metrics`, when the step is a logged one, are shown and kept."""
        self._progress.update(self._task, completed=step)
        if metrics:
            line = _progress_line(metrics)
            self._progress.update(self._task, line=line)
            self._keep(metrics)
            if not self.console.is_terminal:
                self.say(f"step {step}/{self.n_steps}  {line}")

    def evaluation(self, step: int, found: Evaluated) -> None:
        """Keeps and shows the held-out loss, how many samples it leaves out, scores, and generated answers."""
        metrics: Metrics = {"step": step, "eval_loss": found.loss, "eval_n_bad": found.n_bad}
        for name, score in found.scores.items():
            metrics |= {f"eval_{name}": score.value, f"eval_{name}_low": score.low, f"eval_{name}_high": score.high}
        self._keep(metrics)
        left_out = f", {found.n_bad} samples left out" if found.n_bad else ""
        self.say(f"step {step}  held-out loss {found.loss:.4f}{left_out}")
        for name, score in found.scores.items():
            self.say(f"  {name} {in_words(score)}, {score.n} questions")
        for answer in found.answers:
            self._append(ANSWERS_FILE, {"step": step, **answer})
            self.say(f"  {answer['prompt']!r} -> {answer['answer']!r} (expected {answer['expected']!r})")

    def quarantine(self, bad_samples: Iterable[BadSample]) -> None:
        """Records samples that a step did not train on. Those that every rank saw are recorded by rank 0."""
        for bad in bad_samples:
            if self.world.is_main or not bad.on_every_rank:
                names = ("source", "id", "index", "line", "kind", "reason")
                record = {"step": bad.step + 1, **{name: getattr(bad, name) for name in names}}
                self._append(QUARANTINE_FILE, record)

    def bad_step(self, batch: StepBatch, loss: float, grad_norm: float) -> None:
        """Records and shows a step that was not taken, with its samples."""
        samples = [{"source": source, "id": id_} for source, id_ in batch.samples]
        step = batch.step + 1
        self._append(BAD_STEPS_FILE, {"step": step, "loss": loss, "grad_norm": grad_norm, "samples": samples})
        self.say(
            f"step {step} is skipped: its loss ({loss:g}) or gradient norm ({grad_norm:g}) is not finite; "
            f"its {len(samples)} samples are in {self.folder / BAD_STEPS_FILE}"
        )

    def sync(self) -> None:
        """Puts the records on disk, as far as there is room."""
        for name in [name for name, lines in self._unwritten.items() if lines]:
            self._write(name)
        for name in FILES:
            with suppress(OSError), (self.folder / name).open("rb") as file:
                os.fsync(file.fileno())

    def _keep(self, metrics: Metrics) -> None:
        if self.world.is_main:
            self._append(METRICS_FILE, metrics)
            if self._wandb is not None:
                known = {key: value for key, value in metrics.items() if key != "step"}
                self._wandb.log(known, step=metrics["step"])

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if self.world.is_main or name == QUARANTINE_FILE:
            self._unwritten.setdefault(name, []).append(_line(record))
            self._write(name)

    def _write(self, name: str) -> None:
        """Appends what waits for a file; a full disk costs a warning, and the lines wait until there is room."""
        path, n_bytes = self.folder / name, None
        try:
            with path.open("a", encoding="utf-8") as file:
                n_bytes = file.tell()
                file.write("".join(self._unwritten[name]))
        except OSError as error:
            if n_bytes is not None and name != QUARANTINE_FILE:  # other ranks may have added to that one
                os.truncate(path, n_bytes)  # a line that was half written
            if not self._warned:
                print(f"warning: cannot write {path}: {error.strerror}; its lines wait", flush=True)
            self._warned = True
        else:
            self._unwritten[name], self._warned = [], False

    def _start_wandb(self, config: StageConfig) -> None:
        section = config.logging.wandb
        if section is None:
            return
        import wandb

        self._wandb = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            name=config.name,
            id=config.name,
            resume="allow",
            dir=str(self.folder),
            config=config.model_dump(mode="json"),
        )


def quarantine_summary(path: Path) -> str:
    """How many samples of each kind stand in a quarantine file, the most frequent first."""
    counts = Counter(record["kind"] for record in _records(path)).most_common()
    return ", ".join(f"{count} x {KINDS[kind]}" for kind, count in counts)


def parts_table(parts: Iterable[PartSummary]) -> Table:
    """The table of what trains."""
    table = Table("part", "parameters", "trainable", "dtype", "learning rate", title="What trains")
    for part in parts:
        rate = "frozen" if part.lr is None else f"{part.lr:g}" + (" (LoRA)" if part.lora else "")
        dtype = str(part.dtype).removeprefix("torch.")
        table.add_row(part.part, f"{part.n_parameters:,}", f"{part.n_trainable:,}", dtype, rate)
    return table


def _progress_line(metrics: Metrics) -> str:
    minutes, seconds = divmod(int(metrics["time_left_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    mfu = "" if metrics["mfu"] is None else f"MFU {metrics['mfu']:.1%}  "
    return (
        f"loss {metrics['loss']:.4f}  lr {max(metrics['lr'].values()):.2e}  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {mfu}{hours}:{minutes:02}:{seconds:02} left"
    )


def _drop_after(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, and a line that was cut off, from a JSONL file."""
    if path.is_file():
        kept = [record for record in _records(path) if record["step"] <= step]
        write_durably(path, "".join(map(_line, kept)))


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, none if it is missing; a line that was cut off is left out."""
    text, found = path.read_text(encoding="utf-8") if path.is_file() else "", []
    for line in text.split("\n"):  # a text may hold other line ends
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
