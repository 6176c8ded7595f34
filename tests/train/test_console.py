"""What a person sees: the overview of a stage, the line that moves on a terminal, the lines of a log."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llava_train.config import Take
from llava_train.data.mixture import Mixture
from llava_train.data.sources import open_source
from llava_train.failures import explain, of_run
from llava_train.model.trainable import PartSummary
from llava_train.stage_file import parse_stage
from llava_train.train.console import RunConsole, show_overview
from llava_train.train.heaviest import PackShape
from llava_train.train.overview import Overview
from llava_train.train.resume import Resumption
from llava_train.train.terminal import Waiting, drop_unread, new_console, new_live, write_anything
from tests.tiny import stage_content, write_data

PARTS = (
    PartSummary("projector", 20_979_712, 20_979_712, torch.bfloat16, 2e-5),
    PartSummary("language_model", 7_058_370_560, 319_815_680, torch.bfloat16, 2e-4, lora=True),
    PartSummary("vision_tower", 303_507_456, 0, torch.bfloat16, None),
)
METRICS: dict[str, Any] = {
    "loss": 1.5,
    "lr": {"projector": 1e-3},
    "tokens_per_s": 8663.0,
    "mfu": None,
    "data_wait_share": 0.03,
    "peak_memory_bytes": 2**30,
    "step_s": 2.0,
    "time_left_s": 100.0,
}


def overview(folder: Path, resumption: Resumption | None = None, **changes: Any) -> Overview:
    data, more = write_data(folder), write_data(folder, n_samples=20, seed=1)
    content = {"data": [{"path": str(data), "take": "repeat 2"}, {"path": str(more), "take": "first 5"}]}
    content |= {"batch": {"size": 4, "max_tokens": 4096, "max_sample_tokens": 512}, **changes}
    takes = [Take(repeat=2), Take(first=5)]
    return Overview(
        parse_stage({**stage_content(data), **content}, "test"),
        PARTS,
        "projector from runs/llava-1.5-7b-stage1/model, sha256 0c85e8187b93e84f, which is a long line",
        Mixture([open_source(data), open_source(more)], takes),
        None,
        n_steps=14,
        n_ranks=2,
        device=torch.device("cpu"),
        pack=PackShape((512,) * 4, 4, 4, 28),
        memory="about 4.0 GiB of 9.0 GiB; activation_checkpointing none (auto)",
        step_s=None,
        resumption=resumption or Resumption(),
    )


def shown(width: int, is_terminal: bool, told: Overview) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    show_overview(console, told)
    return console.file.getvalue()


def test_a_log_has_a_line_a_fact(tmp_path: Path) -> None:
    lines = [line.rstrip() for line in shown(80, False, overview(tmp_path)).splitlines()]
    for line in (
        "  language_model   7,058,370,560   319,815,680   bfloat16   0.0002 (LoRA)",
        "  starts from  projector from runs/llava-1.5-7b-stage1/model, sha256 0c85e8187b93e84f, which is a long line",
        "  data         data-0: 12 samples, each 2 times",
        "               data-1: 5 of 20 samples",
        "               in all: 29 samples an epoch",
        "  a step       4 samples in packs of at most 2,048 tokens, 4 images (batch.max_tokens: 4,096)",
        "  devices      2 ranks, each on CPU, ZeRO 0, fp32, eager kernels",
        "  memory       about 4.0 GiB of 9.0 GiB; activation_checkpointing none (auto)",
        "  steps        14, 1.93 epochs; a checkpoint every 500",
        "  time         measured after a few steps",
    ):
        assert line in lines


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_is_wide_enough(width: int, tmp_path: Path) -> None:
    lines = shown(width, True, overview(tmp_path)).splitlines()
    assert max(map(len, lines)) <= width
    goes_on = [line for line in lines if line.startswith(15 * " " + "0c85e8187b93e84f")]
    assert len(goes_on) == (width == 80), "below its beginning"


def test_the_expected_time_says_what_it_assumes(tmp_path: Path) -> None:
    told = replace(overview(tmp_path, Resumption(Path("step-4"), {"step": 4})), step_s=720.0)
    assert dict(told.rows())["time"] == "about 2.0 h, if 40% of the peak is reached; measured after a few steps"


def test_a_run_that_goes_on_says_where_it_stands(tmp_path: Path) -> None:
    told = overview(tmp_path, Resumption(Path("step-4"), {"step": 4}, ("step-8: cut off",)))
    assert shown(80, False, told).splitlines()[-2:] == ["passed over step-8: cut off", "resuming after step 4 of 14"]


def test_the_start_says_that_max_steps_is_not_reached(tmp_path: Path) -> None:
    told = overview(tmp_path, schedule={"max_steps": 40})  # 29 samples an epoch, 4 a step
    note = "note: schedule.max_steps 40 is not reached: 1 epoch has 8 steps; raise schedule.epochs to 5"
    assert note in shown(80, False, told).splitlines()
    assert "note:" not in shown(80, False, overview(tmp_path, schedule={"max_steps": 8}))


def run(console: Console) -> str:
    """What 8 steps show, each second of which is logged."""
    with RunConsole("tiny", True, 0, 8, console) as shown:
        for step in range(1, 9):
            logged = step == 1 or step % 2 == 0
            shown.step(step, {**METRICS, "time_left_s": 2.0 * (8 - step)} if logged else None)
        shown.evaluation(8, 1.25, 0, {}, [{"prompt": "<image>\nwhat?", "answer": "\x1b[2J", "expected": "no"}])
    return console.file.getvalue()


def test_a_log_has_a_line_a_logged_step() -> None:
    lines = run(Console(file=io.StringIO(), width=80)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/8", "2/8", "4/8", "6/8", "8/8", "8"]
    assert lines[1] == "step 2/8  loss 1.5000  lr 1.00e-03    8,663 tokens/s  data wait  3.0%  1.0 GiB  0:00:12 left"
    assert "measured over 5 steps: the rest takes about 4 s" in lines
    assert lines[-2:] == ["step 8  held-out loss 1.2500", "  'what?' -> '\\x1b[2J' (expected 'no')"]


def test_a_terminal_has_one_line_that_moves() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True, color_system=None)
    said = run(console)
    assert said.count("\n") == 4, "the pace, the held-out loss, an answer, and at the end the line"
    assert "step 8/8  loss 1.5000  lr 1.00e-03    8,663 tokens/s  0:00:00 left  ━━━━━━━━━━━━" in said
    assert said.endswith("\x1b[?25h"), "the cursor is back"


def test_a_file_is_no_terminal_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with Waiting() as waiting:
        waiting.show("building the model")
        assert not new_console().is_terminal
    assert capsys.readouterr().out == ""


def test_an_answer_that_the_output_cannot_spell_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    write_anything()
    answer = {"prompt": "wer?", "answer": "日本", "expected": "né"}
    RunConsole("run", True, 0, 8).evaluation(0, 1.0, 0, {}, [answer])
    sys.stdout.flush()
    assert written.getvalue().decode("latin-1").splitlines()[-1] == "  'wer?' -> '\\u65e5\\u672c' (expected 'né')"


def test_a_run_whose_output_is_closed_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    write_anything()
    with Waiting() as waiting:
        waiting.show("building the model")
        RunConsole("run", True, 0, 8, waiting.console).say("hello")


def test_a_pipe_that_nobody_reads_ends_a_run_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", closefd=True) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(BrokenPipeError) as caught:
            new_console().print("hello")
        drop_unread()  # else the end of `with`, as Python's own, would raise it again
    assert "nobody reads any more what this run prints" in str(explain(caught.value, of_run()))


def test_errors_that_are_sent_to_a_file_arrive_there_while_a_line_moves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    with new_live(console, "a line"):
        print("a warning", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\n"
