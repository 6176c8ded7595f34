"""What the doctor says of the step that it tried. That it trains one is tested on an installed wheel, in test_packaging."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from llava_train.doctor import machine, trial
from llava_train.doctor.findings import Level, discreet
from llava_train.doctor.processes import Ended, run_python
from llava_train.stage_file import load_stage
from tests.train.helpers import TIMEOUT_S


def test_a_step_that_was_trained_is_told_with_its_time() -> None:
    output = "doctor trains on the CPU in fp32\ndoctor: first step after 8.4 s: imports 5.9, data 0.6\n"
    (finding,) = trial.trained(Ended(0, output, 9.96))
    assert finding.level is Level.ok
    assert finding.text == "one step on the CPU in fp32 in 10.0 s (first step after 8.4 s: imports 5.9, data 0.6)"


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (
            Ended(2, "a\nerror: the driver is too old\nInstall one.\nb\n", 1.0),
            "2): error: the driver is too old; Install one.",
        ),
        (Ended(-11, "loading libcudart\n", 1.0), "signal SIGSEGV): loading libcudart"),
        (Ended(None, "", 300.0), "not done after 300 s): without a word"),
    ],
)
def test_a_step_that_failed_is_broken_and_says_why(ended: Ended, text: str) -> None:
    (finding,) = trial.trained(ended)
    assert finding.level is Level.broken and text in finding.text


@pytest.mark.parametrize(
    ("left", "code", "text"),
    [
        ({"metrics.jsonl": '{"step": 1, "loss": NaN}\n'}, 0, "exit code 1): the loss of the step is nan"),
        ({}, 0, "exit code 1): the loss of the step is None"),
        ({"errors/rank-0.txt": "Traceback\nRuntimeError: no kernel image"}, 1, "RuntimeError: no kernel image"),
        ({}, None, "not done after 1 s): began"),
    ],
)
def test_a_step_has_failed_without_a_finite_loss_and_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, str], code: int | None, text: str
) -> None:
    def run(module: str, arguments: list[str], timeout_s: float, cwd: Path) -> Ended:
        for name, content in left.items():
            path = Path(arguments[0]) / "runs" / trial.NAME / name
            path.parent.mkdir(parents=True)
            path.write_text(content)
        return Ended(code, "began", 1.0)

    monkeypatch.setattr(trial, "run_python", run)
    (finding,) = trial.trained(trial.try_step())
    assert finding.level is Level.broken and text in finding.text


def test_a_machine_without_a_folder_to_write_is_examined_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    (finding,) = trial.trained(trial.try_step())
    assert finding.level is Level.broken and discreet(finding.text).endswith("No usable temporary directory found")
    assert [each.mend for each in machine.disks() if each.level is Level.broken] == [
        "make room in /tmp, or set TMPDIR to a folder that has some"
    ]


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Patient(subprocess.Popen):  # type: ignore[type-arg]
        """Its time begins when the process has started another one."""

        def communicate(self, input: Any = None, timeout: float | None = None) -> Any:
            while timeout is not None and not (tmp_path / "began").exists():
                time.sleep(0.01)
            return super().communicate(input, timeout)

    monkeypatch.setattr(subprocess, "Popen", Patient)
    (tmp_path / "sleeps.py").write_text(
        "import pathlib, subprocess, sys, time\nprint('began', flush=True)\n"
        "child = subprocess.Popen(['sleep', '9999'])\npathlib.Path('began').touch()\nchild.wait()"
    )
    ended = run_python("sleeps", [], timeout_s=0.1, cwd=tmp_path)
    assert ended.code is None and ended.output == "began\n"


def test_variables_of_launchers_do_not_reach_the_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "prints.py").write_text("import os; print(os.environ.get('WORLD_SIZE'))")
    assert run_python("prints", [], timeout_s=TIMEOUT_S, cwd=tmp_path).output == "None\n"


def test_the_stage_of_the_trial_is_one_that_is_taken(tmp_path: Path) -> None:
    trial.write_stage(tmp_path)
    stage = load_stage(tmp_path / "stage.yaml")
    assert (stage.name, stage.schedule.max_steps) == (trial.NAME, 1)
