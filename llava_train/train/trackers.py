"""Trackers that others look at: TensorBoard, wandb. One that fails is told once and left; it never stops a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from llava_train.config import StageConfig
from llava_train.run_files import METRICS_FILE

Metrics = dict[str, Any]
"""A line of metrics.jsonl: `lines.StepLine` or `lines.EvaluationLine`."""
Answer = Mapping[str, Any]
"""A line of answers.jsonl but for its step: `id`, `prompt`, `answer`, `expected`, `pictures` (in the run folder)."""


class Tracker(Protocol):
    """Somewhere that metrics go to. Whatever it raises, the run goes on without it."""

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Takes a line of metrics.jsonl."""

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Takes generated answers to held-out questions."""

    def close(self, failed: bool) -> None:
        """Ends it; nothing may be lost."""


Start = Callable[[StageConfig, int, Callable[[str], None]], Tracker]
"""Starts a tracker: of which run, after how many steps, and how it says something."""


def _tensorboard(config: StageConfig, start_step: int, say: Callable[[str], None]) -> Tracker:
    from llava_train.train.tensorboard import TensorBoard  # imports what only those wait for who want it

    return TensorBoard(config, start_step)


def _wandb(config: StageConfig, start_step: int, say: Callable[[str], None]) -> Tracker:
    from llava_train.train.wandb_run import WandbRun

    return WandbRun(config, say)


class Trackers:
    """All trackers that a stage file names; none on ranks but 0.

    Args:
        start_step: steps done before.
        say: shows a line.
    """

    def __init__(self, config: StageConfig, is_main: bool, start_step: int, say: Callable[[str], None]) -> None:
        self._all: dict[str, Tracker] = {}
        self._say = say
        wanted: dict[str, Start] = {}
        if is_main and config.logging.tensorboard:
            wanted["tensorboard"] = _tensorboard
        if is_main and config.logging.wandb and config.logging.wandb.mode != "disabled":
            wanted["wandb"] = _wandb
        for name, start in wanted.items():
            with self._left_if_it_fails(name):
                self._all[name] = start(config, start_step, say)

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Takes a line of metrics.jsonl."""
        for name, tracker in list(self._all.items()):
            with self._left_if_it_fails(name):
                tracker.metrics(step, metrics)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Takes generated answers to held-out questions."""
        for name, tracker in list(self._all.items()):
            with self._left_if_it_fails(name):
                tracker.answers(step, answers)

    def close(self, failed: bool) -> None:
        """Ends all."""
        for name, tracker in list(self._all.items()):
            with self._left_if_it_fails(name):
                tracker.close(failed)
        self._all.clear()

    @contextmanager
    def _left_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._all.pop(name, None)
            why = str(error).strip() or type(error).__name__
            self._say(f"logging.{name}: {why}; the run goes on without it, {METRICS_FILE} has everything")
