"""What a run says that fails: a message of at most eight lines on the rank that failed, one line on the others."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_train.cli import run
from tests.train.helpers import run_many, start_ranks, wait, write_samples, write_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_samples(folder / "data.json", "itim" * 2)
    return folder


def failed(fault: str, folder: Path, n_ranks: int = 1, **changes: Any) -> tuple[list[int], list[list[str]], Path]:
    """Exit codes and last words of the ranks of a run with a fault, and the folder of the run."""
    name = re.sub(r"\W", "-", fault) + f"-{n_ranks}"
    write_stage(folder / f"{name}.yaml", **changes)
    arguments = ["-m", "tests.train.failure_rank", fault, "--config", f"{name}.yaml"]
    done = wait(start_ranks(arguments, folder, n_ranks), folder)
    words = [[line for line in text.splitlines() if line and not line.startswith("Writing ")] for text in done.stderr]
    return done.codes, words, folder / "runs" / name


def traceback_named_in(lines: list[str], folder: Path) -> str:
    [named] = [line for line in lines if line.startswith("traceback: ")]
    path = folder / named.removeprefix("traceback: ")
    return path.read_text(encoding="utf-8")


def test_a_bug_ends_with_what_was_done_where_and_a_traceback_file(folder: Path) -> None:
    [code], [lines], run = failed("a bug", folder)
    assert code == 1
    assert lines[0] == "error: llava_train failed in forward and backward of step 2, and does not know why"
    assert re.fullmatch(r"KeyError: 'optimizer' \(at llava_train/train/loop\.py:\d+ in train\)", lines[1])
    assert "The same command goes on from the beginning." in lines
    assert "llava-train doctor" in lines[-1] and len(lines) <= 8
    kept = traceback_named_in(lines, folder)
    assert kept.endswith("KeyError: 'optimizer'\n") and "failure_rank.py" in kept
    assert len(list((run / "errors").iterdir())) == 1


def test_the_rank_that_failed_says_why_and_the_other_says_so_in_a_line(folder: Path) -> None:
    codes, (other, failing), _ = failed("a bug", folder, n_ranks=2)
    assert codes == [1, 1]
    assert (
        failing[0].startswith("error: rank 1: llava_train failed in forward and backward of step 2")
        and len(failing) <= 8
    )
    assert len(other) == 1 and other[0].startswith("rank 0 stopped in ")
    assert "the connection to another rank broke" in other[0]


def test_a_rank_that_was_killed_leaves_one_line_on_the_other(folder: Path) -> None:
    codes, (other, killed), _ = failed("its end", folder, n_ranks=2)
    assert codes == [1, -9] and not killed
    assert len(other) == 1 and "which failed or was ended" in other[0]


@pytest.mark.parametrize(
    ("fault", "said"),
    {
        "no host memory": "the memory of this machine ran out in forward and backward of step 2",
        "a worker's end": "a worker of the loader (process ",
        "no room for the result": "a file is larger than the file system, or `ulimit -f`, allows in writing the result",
    }.items(),
)
def test_what_the_machine_lacks_is_said_with_what_to_do(fault: str, said: str, folder: Path) -> None:
    [code], [lines], _ = failed(fault, folder, loader={"workers": int(fault.startswith("a worker"))})
    assert code == 2
    assert lines[0].startswith(f"error: {said}") and 4 <= len(lines) <= 8
    assert "Traceback (most recent call last)" in traceback_named_in(lines, folder)


def test_a_bug_in_a_worker_is_told_like_one_of_the_rank(folder: Path) -> None:
    [code], [lines], _ = failed("a worker's bug", folder, loader={"workers": 1})
    assert code == 1
    assert lines[1].startswith("KeyError: 'sample' (at llava_train/data/loader.py:") and len(lines) <= 8


def test_a_checkpoint_of_other_adapters_is_refused_in_words(folder: Path) -> None:
    for rank in (4, 8):
        lora = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3, "lora": {"rank": rank, "alpha": 8}}}
        write_stage(
            folder / f"lora-{rank}.yaml",
            trainable=lora,
            checkpoint={"every": 1},
            schedule={"max_steps": 1},
            name="lora",
        )
    first, changed = (["--config", folder / f"lora-{rank}.yaml", "--set", f"output={folder}/out"] for rank in (4, 8))
    assert run_many({"first": first}, folder)["first"][0].code == 0
    shutil.rmtree(folder / "out/lora/model")
    [outcome] = run_many({"changed": [*changed, "--allow-config-change"]}, folder)["changed"]
    assert outcome.code == 2
    lines = outcome.stderr[outcome.stderr.index("error: ") :].splitlines()
    assert "step-00000001 does not fit this run: size mismatch for " in lines[0]
    assert "give the run another name" in lines[1] and len(lines) == 3
    assert "RuntimeError" in traceback_named_in(lines, folder)
    card = yaml.safe_load((folder / "out/lora/config.yaml").read_text(encoding="utf-8"))
    assert card["trainable"]["language_model"]["lora"]["rank"] == 4, "a change that fits no checkpoint is not the run's"


def test_a_wrong_launcher_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = write_stage(folder / "never.yaml", output=str(folder / "never"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert run([stage], []) == 2
    assert capsys.readouterr().err.startswith("error: RANK is set (0), as by a launcher, but LOCAL_RANK, WORLD_SIZE,")
    assert not (folder / "never").exists()


def test_a_taken_port_is_named(folder: Path) -> None:
    [code], [lines], run_dir = failed("a taken port", folder)
    assert code == 2
    assert re.fullmatch(r"error: rank 0: the port \d+ is in use, where the processes of this run would meet", lines[0])
    assert [line for line in lines if line.startswith("traceback: ")] and not run_dir.exists()
