"""What a run shows in the terminal: an overview at the start, a progress line, what was found. Rank 0 alone speaks.

On a terminal one line moves; in a log each logged step has a line of its own.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llava_train.model.trainable import PartSummary
from llava_train.train.overview import Overview
from llava_train.train.pace import Pace
from llava_train.train.progress import fields, fitted, joined
from llava_train.train.terminal import new_console, new_live
from llava_train.use.metrics import Score, in_words

_REFRESH_S = 0.1
_LABEL_WIDTH = 13
_NARROWEST_BAR, _WIDEST_BAR = 8, 40
_LONGEST_ANSWER = 100


class RunConsole:
    """The terminal of a run; silent unless `speaks`."""

    def __init__(self, name: str, speaks: bool, start_step: int, n_steps: int, console: Console | None = None) -> None:
        self.console = console or new_console(speaks)
        self._pace = Pace()
        self._line = _ProgressLine(n_steps, start_step, self._pace)
        self._live = new_live(self.console, self._line)
        self._moves = speaks and self.console.is_interactive
        self._refreshed = 0.0

    def __enter__(self) -> RunConsole:
        if self._moves:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._moves:
            self._live.stop()

    def say(self, text: str) -> None:
        """Shows a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def step(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Moves the progress line to `step`; `metrics`, when the step is a logged one, are shown."""
        line = self._line
        line.step, line.metrics = step, metrics or line.metrics
        told = self._pace.measured(step, metrics) if metrics else None
        if metrics and not self._moves:
            self.say(joined(line.fields()))
        if told:
            self.say(told)
        if self._moves and (metrics or time.monotonic() > self._refreshed + _REFRESH_S):
            self._refreshed = time.monotonic()
            self._live.refresh()

    def evaluation(
        self, step: int, loss: float, n_bad: int, scores: Mapping[str, Score], answers: Iterable[Mapping[str, Any]]
    ) -> None:
        """Shows the held-out loss, how many samples it leaves out, scores, and generated answers."""
        left_out = f", {n_bad} samples left out" if n_bad else ""
        self.say(f"step {step}  held-out loss {loss:.4f}{left_out}")
        for name, score in scores.items():
            self.say(f"  {name} {in_words(score)}, {score.n} questions")
        for answer in answers:
            prompt, said, expected = (_quoted(answer[key]) for key in ("prompt", "answer", "expected"))
            self.say(f"  {prompt} -> {said} (expected {expected})")


class _ProgressLine:
    """What the moving line shows; rich asks for it with the width of the terminal."""

    def __init__(self, n_steps: int, step: int, pace: Pace) -> None:
        self.n_steps, self.step, self.pace = n_steps, step, pace
        self.metrics: Mapping[str, Any] = {}

    def fields(self) -> dict[str, str]:
        return fields(self.metrics, self.step, self.n_steps, self.pace.step_s)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = joined(fitted(self.fields(), options.max_width))
        room = options.max_width - len(line) - 2
        if room < _NARROWEST_BAR:
            yield Text(line, no_wrap=True, overflow="crop")
            return
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(line, ProgressBar(self.n_steps, self.step, width=min(room, _WIDEST_BAR)))
        yield row


def show_overview(console: Console, overview: Overview) -> None:
    """Shows what a stage is about to do."""
    console.print(Padding(parts_table(overview.parts), (1, 0, 1, 1), expand=False))
    show_rows(console, overview.rows())
    console.print()
    for note in overview.notes():
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def show_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Shows a label and a text each; on a terminal, long texts go on below their beginning."""
    for label, text in rows:
        room = console.width - _LABEL_WIDTH - 2
        lines = textwrap.wrap(text, room, break_long_words=False) if console.is_terminal and room > 20 else [text]
        for number, line in enumerate(lines):
            shown = Text.assemble("  ", (f"{'' if number else label:<{_LABEL_WIDTH}}", "bold"), line)
            console.print(shown, soft_wrap=True)


def parts_table(parts: Iterable[PartSummary]) -> Table:
    """The table of what trains."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    table.add_column("dtype")
    table.add_column("learning rate")
    for part in parts:
        rate = "frozen" if part.lr is None else f"{part.lr:g}" + (" (LoRA)" if part.lora else "")
        dtype = str(part.dtype).removeprefix("torch.")
        style = "dim" if part.lr is None else ""
        table.add_row(part.part, f"{part.n_parameters:,}", f"{part.n_trainable:,}", dtype, rate, style=style)
    return table


def _quoted(text: str) -> str:
    """What a model or a data set says, without what a terminal would take for commands."""
    words = repr(text.replace("<image>", "").strip())
    return words if len(words) <= _LONGEST_ANSWER else words[:_LONGEST_ANSWER] + "..."
