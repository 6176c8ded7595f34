"""wandb: curves, tables of answers with their pictures, and the stage file, in one run of wandb for each run folder.

Rows have a `step` of their own, which the curves are drawn over: wandb refuses rows whose own step number has passed,
and a run that was interrupted goes back to its checkpoint. What was sent of the steps since is sent again, and equal.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import wandb

from llava_train.config import StageConfig, WandbSection
from llava_train.files import write_durably
from llava_train.run_files import ANSWERS_FILE, WANDB_FOLDER, WANDB_ID_FILE
from llava_train.train.curves import curves
from llava_train.train.run_folder import read_card
from llava_train.train.trackers import Answer, Metrics

_START_S, _END_S, _LEAVE_S = 60, 15, 5
"""Bounds of the waits for the server, and for wandb's process: a launcher kills 30 s after it has asked to stop."""


class WandbRun:
    """A run of wandb. Without a server, or a key to it, the run is kept for `wandb sync`."""

    def __init__(self, config: StageConfig, say: Callable[[str], None]) -> None:
        section = config.logging.wandb
        assert section is not None
        self._folder, self._say = config.run_dir, say
        try:
            self._run = _start(config, section, section.mode)
        except Exception as error:
            if section.mode != "online":
                raise
            why = " ".join(str(error).split())
            say(f"logging.wandb: {why}; kept offline (`wandb login` makes a key known)")
            wandb.teardown()  # else the id is in use
            self._run = _start(config, section, "offline")
        self._sync = f"`wandb sync {Path(self._run.dir).parent}` sends it"
        say(f"logging.wandb: {self._sync if self._run.offline else self._run.url}")

    def metrics(self, step: int, metrics: Metrics) -> None:
        """A row of the history."""
        self._run.log({"step": step, **curves(metrics)})

    def answers(self, step: int, answers: Sequence[Answer]) -> None:
        """A table, one column a picture. One that the server does not take is told, and the curves go on."""
        try:
            with _staged_in(self._folder / WANDB_FOLDER):
                self._run.log({"step": step, "answers": self._table(answers)})
        except Exception as error:  # without a server wandb takes no tables, though rows
            why = " ".join(str(error).split())
            self._say(f"logging.wandb: without the answers of step {step}, which {ANSWERS_FILE} has: {why}")

    def _table(self, answers: Sequence[Answer]) -> wandb.Table:
        n_pictures = max((len(answer.get("pictures", ())) for answer in answers), default=0)
        of_pictures = [f"picture {number}" for number in range(1, n_pictures + 1)]
        table = wandb.Table(columns=["id", *of_pictures, "prompt", "answer", "expected"])
        for answer in answers:
            pictures: list[Any] = [wandb.Image(str(self._folder / name)) for name in answer.get("pictures", ())]
            pictures += [None] * (n_pictures - len(pictures))
            table.add_data(answer["id"], *pictures, answer["prompt"], answer["answer"], answer["expected"])
        return table

    def close(self, failed: bool) -> None:
        """Raises TimeoutError when the server does not take what is left."""
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            raise TimeoutError(f"the server did not take all within {_END_S} s; {self._sync}") from None


def _start(config: StageConfig, section: WandbSection, mode: Literal["online", "offline", "disabled"]) -> Any:
    settings = wandb.Settings(silent=True, init_timeout=_START_S, finish_timeout=_END_S, finish_timeout_raises=True)
    with _unasked():
        run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=mode,
            name=config.name,
            id=run_id(config.run_dir / WANDB_ID_FILE, config.name),
            resume="allow",
            dir=str(config.run_dir),
            config=read_card(config.run_dir) or config.model_dump(mode="json"),
            settings=settings,
        )
    atexit.unregister(_end_process)
    atexit.register(_end_process)  # after wandb's own, and so called before it
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


@contextmanager
def _unasked() -> Iterator[None]:
    """On a terminal wandb would ask for a key that it lacks, and the run wait for an answer."""
    own = sys.stdin
    with Path(os.devnull).open() as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = own


def _end_process() -> None:
    """Ends wandb's own process with this one. wandb itself waits for it: 30 s more for a server that does not answer.

    What it had is on disk then, for `wandb sync`.
    """

    def ask() -> None:
        with suppress(Exception):  # it may be gone already
            wandb.teardown()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_LEAVE_S)
    for process in psutil.Process().children() if asking.is_alive() else ():
        with suppress(psutil.Error):
            if process.name() == "wandb-core":
                process.kill()
    asking.join(_LEAVE_S)


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """wandb keeps pictures of tables until they are sent, by default in the user's home."""
    own = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = own or str(folder.resolve())
    try:
        yield
    finally:
        if own is None:
            del os.environ["WANDB_DATA_DIR"]


def run_id(path: Path, name: str) -> str:
    """The id in a file, made at first, and for a copy of the folder under another name."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["name"] == name:
            return str(kept["id"])
    made = secrets.token_hex(4)
    write_durably(path, json.dumps({"id": made, "name": name}))
    return made
