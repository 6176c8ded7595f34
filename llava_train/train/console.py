"""What a run shows in the terminal: tables at the start, a progress line, what was found. Rank 0 alone speaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from llava_train.model.trainable import PartSummary
from llava_train.use.metrics import Score, in_words


class RunConsole:
    """The terminal of a run; silent unless `speaks`."""

    def __init__(self, name: str, speaks: bool, start_step: int, n_steps: int) -> None:
        self.n_steps = n_steps
        self.console = Console(quiet=not speaks, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=n_steps, completed=start_step, line="")

    def __enter__(self) -> RunConsole:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Shows a line."""
        self.console.print(text, highlight=False, markup=False)

    def started(self, parts: Iterable[PartSummary], step: int, passed_over: Iterable[str]) -> None:
        """Shows what trains and where the run stands."""
        self.console.print(parts_table(parts))
        for reason in passed_over:
            self.say(f"passed over {reason}")
        if step:
            self.say(f"resuming after step {step} of {self.n_steps}")

    def step(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Moves the progress bar to `step`; `metrics`, when the step is a logged one, are shown."""
        self._progress.update(self._task, completed=step)
        if metrics:
            line = progress_line(metrics)
            self._progress.update(self._task, line=line)
            if not self.console.is_terminal:
                self.say(f"step {step}/{self.n_steps}  {line}")

    def evaluation(
        self, step: int, loss: float, n_bad: int, scores: Mapping[str, Score], answers: Iterable[Mapping[str, Any]]
    ) -> None:
        """Shows the held-out loss, how many samples it leaves out, scores, and generated answers."""
        left_out = f", {n_bad} samples left out" if n_bad else ""
        self.say(f"step {step}  held-out loss {loss:.4f}{left_out}")
        for name, score in scores.items():
            self.say(f"  {name} {in_words(score)}, {score.n} questions")
        for answer in answers:
            self.say(f"  {answer['prompt']!r} -> {answer['answer']!r} (expected {answer['expected']!r})")


def parts_table(parts: Iterable[PartSummary]) -> Table:
    """The table of what trains."""
    table = Table("part", "parameters", "trainable", "dtype", "learning rate", title="What trains")
    for part in parts:
        rate = "frozen" if part.lr is None else f"{part.lr:g}" + (" (LoRA)" if part.lora else "")
        dtype = str(part.dtype).removeprefix("torch.")
        table.add_row(part.part, f"{part.n_parameters:,}", f"{part.n_trainable:,}", dtype, rate)
    return table


def progress_line(metrics: Mapping[str, Any]) -> str:
    """A logged step in one line."""
    minutes, seconds = divmod(int(metrics["time_left_s"]), 60)
    hours, minutes = divmod(minutes, 60)
    mfu = "" if metrics["mfu"] is None else f"MFU {metrics['mfu']:.1%}  "
    return (
        f"loss {metrics['loss']:.4f}  lr {max(metrics['lr'].values()):.2e}  "
        f"{metrics['tokens_per_s']:,.0f} tokens/s  {mfu}{hours}:{minutes:02}:{seconds:02} left"
    )
