"""What a run shows and keeps: the terminal, its JSONL files, and trackers that others look at."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_train.config import StageConfig
from llava_train.data.loader import BadSample, StepBatch
from llava_train.run_files import ANSWERS_FILE, BAD_STEPS_FILE, METRICS_FILE, QUARANTINE_FILE, read_records
from llava_train.train.console import RunConsole
from llava_train.train.records import Records
from llava_train.train.trackers import Answer, Metrics, Trackers
from llava_train.train.world import World
from llava_train.use.metrics import Score


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found: the held-out loss, samples that it leaves out, answers, and their scores by name."""

    loss: float
    n_bad: int
    answers: tuple[Answer, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)


class Tracking:
    """All that a run shows and keeps. Only rank 0 shows and logs; every rank may quarantine.

    Args:
        start_step: steps done before; records of later steps, from before an interruption, are dropped.
    """

    def __init__(self, config: StageConfig, world: World, start_step: int, n_steps: int) -> None:
        self.folder, self.world = config.run_dir, world
        self.console = RunConsole(config.name, world.is_main, start_step, n_steps)
        self.records = Records(config.run_dir, world, start_step)
        self.n_bad_before = len(read_records(self.folder / QUARANTINE_FILE)) if world.is_main else 0
        """Samples left out before, on rank 0."""
        self.trackers = Trackers(config, world.is_main, start_step, self.say)

    def __enter__(self) -> Tracking:
        self.console.__enter__()
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        self.console.__exit__()
        self.trackers.close(failed=raised is not None)

    def say(self, text: str) -> None:
        """Shows a line on rank 0."""
        self.console.say(text)

    def step(self, step: int, metrics: Metrics | None = None) -> None:
        """Moves the progress bar to `step`; `metrics`, when the step is a logged one, are shown and kept."""
        self.console.step(step, metrics)
        if metrics:
            self._keep(metrics)

    def evaluation(self, step: int, found: Evaluated) -> None:
        """Keeps and shows the held-out loss, how many samples it leaves out, scores, and generated answers."""
        metrics: Metrics = {"step": step, "time": time.time(), "eval_loss": found.loss, "eval_n_bad": found.n_bad}
        for name, score in found.scores.items():
            metrics |= {f"eval_{name}": score.value, f"eval_{name}_low": score.low, f"eval_{name}_high": score.high}
        self._keep(metrics)
        for answer in found.answers:
            self.records.append(ANSWERS_FILE, {"step": step, **answer})
        if found.answers:
            self.trackers.answers(step, found.answers)
        self.console.evaluation(step, found.loss, found.n_bad, found.scores, found.answers)

    def quarantine(self, bad_samples: Iterable[BadSample]) -> None:
        """Records samples that a step did not train on. Those that every rank saw are recorded by rank 0."""
        for bad in bad_samples:
            if self.world.is_main or not bad.on_every_rank:
                names = ("source", "id", "index", "line", "kind", "reason")
                record: dict[str, Any] = {"step": bad.step + 1, **{name: getattr(bad, name) for name in names}}
                self.records.append(QUARANTINE_FILE, record)

    def bad_step(self, batch: StepBatch, loss: float, grad_norm: float) -> None:
        """Records and shows a step that was not taken, with its samples."""
        samples = [{"source": source, "id": id_} for source, id_ in batch.samples]
        step = batch.step + 1
        self.records.append(BAD_STEPS_FILE, {"step": step, "loss": loss, "grad_norm": grad_norm, "samples": samples})
        self.say(
            f"step {step} is skipped: its loss ({loss:g}) or gradient norm ({grad_norm:g}) is not finite; "
            f"its {len(samples)} samples are in {self.folder / BAD_STEPS_FILE}"
        )

    def sync(self) -> None:
        """Puts the records on disk, as far as there is room."""
        self.records.sync()

    def _keep(self, metrics: Metrics) -> None:
        self.records.append(METRICS_FILE, metrics)
        self.trackers.metrics(metrics["step"], metrics)
