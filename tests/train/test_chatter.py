from __future__ import annotations

import logging
import logging.handlers
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_train import cli
from llava_train.train import chatter
from llava_train.train.chatter import turn_down
from tests.train.helpers import TRAIN, run_ranks, write_samples, write_stage


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves other tests what they had."""
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setenv(chatter._NO_BARS, "1")
    yield
    logging.disable(logging.NOTSET)
    for name in chatter._NO_NEWS:
        logging.getLogger(name).removeFilter(chatter._is_news)


def shown(is_main: bool) -> list[str]:
    """Which warnings of a few get through."""
    raised = [
        (FutureWarning, "torch.distributed.c10d_logger"),
        (FutureWarning, "transformers.modeling_utils"),
        (FutureWarning, "torchmetrics"),
        (FutureWarning, "llava_train.train.loop"),
        (UserWarning, "torch.nn.functional"),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        turn_down(is_main)
        for number, (category, module) in enumerate(raised):
            warnings.warn_explicit(module, category, "file.py", number, module)
    return [str(warning.message) for warning in caught]


def test_warnings_that_matter_still_show() -> None:
    assert shown(is_main=True) == ["torchmetrics", "llava_train.train.loop", "torch.nn.functional"]


def test_other_ranks_leave_warnings_to_the_first_and_tell_errors() -> None:
    assert shown(is_main=False) == []
    assert not logging.getLogger("transformers").isEnabledFor(logging.WARNING)
    assert logging.getLogger("transformers").isEnabledFor(logging.ERROR)


def test_what_python_is_told_about_warnings_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert len(shown(is_main=True)) == 5


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels"),
    ],
)
def test_of_a_librarys_warnings_one_is_no_news(name: str, known: str) -> None:
    turn_down()
    log, handler = logging.getLogger(name), logging.handlers.BufferingHandler(10)
    log.addHandler(handler)
    log.warning(known)
    log.warning("the disk is slow")
    log.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == ["the disk is slow"]


@pytest.mark.parametrize(
    ("command", "expected"), [(["schema"], 1), (["train", "--help"], 0), (["lmms-eval", "--help"], 0)]
)
def test_the_commands_that_use_a_model_are_quiet_too(
    command: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(cli, "turn_down", calls.append)
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert len(calls) == expected


def test_verbose_shows_what_deepspeed_says(tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itit")
    stage = write_stage(tmp_path / "tiny.yaml")
    said = run_ranks([TRAIN, "--config", stage, "--verbose"], tmp_path).check().stdout[0]
    assert "DeepSpeed info: version" in said
    assert "tiny: finished, result in runs/tiny/model" in said
