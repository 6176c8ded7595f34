"""TensorBoard: curves, and answers with their pictures, in `tensorboard/` of the run's folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from llava_train.config import StageConfig
from llava_train.run_files import TENSORBOARD_FOLDER
from llava_train.train.curves import curves
from llava_train.train.trackers import Answer, Metrics

_FLUSH_S = 10
"""So that a run can be watched."""


class TensorBoard:
    """Event files of a run. Each start adds one, which takes back what earlier ones say of later steps.

    Args:
        start_step: steps done before.
    """

    def __init__(self, config: StageConfig, start_step: int) -> None:
        self._folder, self._shown = config.run_dir, set[str]()
        first = start_step + 1 if start_step else 0  # a new run evaluates before its first step
        self._writer = SummaryWriter(
            str(config.run_dir / TENSORBOARD_FOLDER), purge_step=first, flush_secs=_FLUSH_S, max_queue=1000
        )

    def metrics(self, step: int, metrics: Metrics) -> None:
        """A point of each curve."""
        for name, value in curves(metrics).items():
            self._writer.add_scalar(name, value, step, walltime=metrics["time"])

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """A text for each question; its pictures, which stay the same, once a start."""
        for answer in answers:
            tag = f"answers/{answer['id']}"
            self._writer.add_text(tag, _markdown(answer), step)
            for number, name in enumerate(answer.get("pictures", ()), start=1):
                if (shown := f"{tag}/{number}") not in self._shown:
                    with Image.open(self._folder / name) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                    self._writer.add_image(shown, pixels, step, dataformats="HWC")
                    self._shown.add(shown)

    def close(self, failed: bool) -> None:
        """Writes what waits."""
        self._writer.close()


def _markdown(answer: Answer) -> str:
    """Question, answer and reference, as they are: indented text is not read as Markdown."""
    return "\n\n".join(
        f"**{name}**\n\n" + "\n".join(f"    {line}" for line in answer[name].splitlines() or [""])
        for name in ("prompt", "answer", "expected")
    )
