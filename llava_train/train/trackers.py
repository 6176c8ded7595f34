"""Trackers that others look at: wandb. One that fails is told once and left; it never stops a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llava_train.config import StageConfig

Metrics = dict[str, Any]
"""A line of metrics.jsonl: docs/metrics.md."""
Answer = Mapping[str, Any]
"""A line of answers.jsonl but for its step: `id`, `prompt`, `answer`, `expected`, `pictures` (in the run folder)."""


class Tracker(Protocol):
    """Somewhere that metrics go to."""

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Takes a line of metrics.jsonl."""

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Takes generated answers to held-out questions."""

    def close(self) -> None:
        """Ends it; nothing may be lost."""


class Trackers:
    """All trackers that a stage file names; none on ranks but 0."""

    def __init__(self, config: StageConfig, is_main: bool) -> None:
        self._all: list[Tracker] = []
        if is_main and config.logging.wandb is not None:
            self._all.append(Wandb(config))

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Takes a line of metrics.jsonl."""
        for tracker in self._all:
            tracker.metrics(step, metrics)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Takes generated answers to held-out questions."""
        for tracker in self._all:
            tracker.answers(step, answers)

    def close(self) -> None:
        """Ends all."""
        for tracker in self._all:
            tracker.close()


class Wandb:
    """A run of wandb."""

    def __init__(self, config: StageConfig) -> None:
        import wandb

        section = config.logging.wandb
        assert section is not None
        self._run: Any = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            name=config.name,
            id=config.name,
            resume="allow",
            dir=str(config.run_dir),
            config=config.model_dump(mode="json"),
        )

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Takes a line of metrics.jsonl."""
        self._run.log({key: value for key, value in metrics.items() if key != "step"}, step=step)

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """Not yet."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
