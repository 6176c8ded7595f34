from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.train.helpers import run_many, start_ranks, wait, write_samples, write_stage

BOTH = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}}
BATCH = {"size": 4, "max_tokens": 1024, "max_sample_tokens": 152}
"""The longest sample has 151 tokens, the four longest together 537."""


def told_by_last_rank(activity: str, folder: Path, n_ranks: int) -> list[str]:
    """The error of a rank that runs out of memory in an activity, in lines, after all ranks ended by themselves."""
    arguments = ["-m", "tests.train.out_of_memory_rank", activity, "--config", "a.yaml"]
    ended = wait(start_ranks(arguments, folder, n_ranks), folder)
    *others, last = ended.codes
    assert last == 2, ended.stderr[-1][-3000:]
    assert not {0, -9} & set(others), "the other rank had to be killed"
    assert "Traceback" not in ended.stderr[-1]
    told = ended.stderr[-1][ended.stderr[-1].index("error: ") :].strip().splitlines()
    assert len(told) <= 8
    return told


def test_the_rank_that_runs_out_of_memory_says_what_to_change_and_no_rank_hangs(tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itim" * 3)
    write_stage(tmp_path / "a.yaml", trainable=BOTH, batch=BATCH)
    told = told_by_last_rank("step 2", tmp_path, n_ranks=2)
    assert "rank 1" in told[0] and "ran out in step 2: a pack of" in told[0]
    text = "\n".join(told)
    assert "Tried to allocate 2.00 GiB" not in told[0] and "CUDA out of memory" in told[1]
    assert "weights of language_model" in text and "activations" in text
    assert re.search(r"change: --set batch\.max_tokens=1\d\d ", text)


@pytest.mark.parametrize(
    ("activity", "change"),
    {
        "starting DeepSpeed": "change: --set batch.max_tokens=268",
        "computing features": "change: --set loader.cache_features=false",
        "evaluating": "change: a lower eval.max_new_tokens",
    }.items(),
)
def test_advice_is_given_whatever_the_stage_was_doing(activity: str, change: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itim" * 3)
    evaluation = {"every": 1, "data": [{"path": "data.json"}], "generate": 0}
    write_stage(
        tmp_path / "a.yaml", trainable=BOTH, batch=BATCH, eval=evaluation, loader={"workers": 0, "cache_features": True}
    )
    told = told_by_last_rank(activity, tmp_path, n_ranks=1)
    assert f"ran out in {activity}" in told[0]
    assert change in "\n".join(told)


def test_a_run_says_what_memory_it_expects_to_take_and_by_which_way_of_checkpointing(tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itim")
    commands = {}
    for name, engine in {"auto": {}, "told": {"activation_checkpointing": "selective"}}.items():
        stage = write_stage(tmp_path / f"{name}.yaml", engine={"zero": 0, "precision": "fp32", **engine})
        commands[name] = ["--config", stage]
    outcomes = run_many(commands, tmp_path)
    for name, way in {"auto": "none (auto)", "told": "selective"}.items():
        assert outcomes[name][0].code == 0
        (line,) = [line for line in outcomes[name][0].stdout.splitlines() if line.startswith("  memory")]
        told = rf"about [\d.]+ MiB of [\d.]+ GiB; activation_checkpointing {re.escape(way)}"
        assert re.fullmatch(rf"  memory +{told}; Python and its libraries not counted", line)
