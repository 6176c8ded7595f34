from __future__ import annotations

from pathlib import Path

from tests.train.helpers import run_many, start_ranks, wait, write_samples, write_stage

BOTH = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}}
BATCH = {"size": 4, "max_tokens": 1024, "max_sample_tokens": 256}


def test_the_rank_that_runs_out_of_memory_says_what_to_change_and_no_rank_hangs(tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itim" * 3)
    write_stage(tmp_path / "a.yaml", trainable=BOTH, batch=BATCH)
    ranks = start_ranks(["-m", "tests.train.out_of_memory_rank", "--config", "a.yaml"], tmp_path, n_ranks=2)
    ended = wait(ranks, tmp_path)
    assert ended.codes[1] == 2
    assert ended.codes[0] not in (0, -9), "the other rank had to be killed"
    told = ended.stderr[1][ended.stderr[1].index("error: ") :].strip().splitlines()
    assert len(told) <= 8
    assert "rank 1" in told[0] and "ran out in step 2: a pack of" in told[0]
    text = "\n".join(told)
    assert "Tried to allocate 2.00 GiB" not in told[0] and "CUDA out of memory" in told[1]
    assert "weights of language_model" in text and "activations" in text
    assert "--set batch.max_tokens=256" in text
    assert "Traceback" not in ended.stderr[1]


def test_a_run_says_which_way_of_checkpointing_auto_took_and_why(tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "itim")
    commands = {}
    for name, engine in {"auto": {}, "told": {"activation_checkpointing": "selective"}}.items():
        stage = write_stage(tmp_path / f"{name}.yaml", engine={"zero": 0, "precision": "fp32", **engine})
        commands[name] = ["--config", stage]
    outcomes = run_many(commands, tmp_path)
    (line,) = [line for line in outcomes["auto"][0].stdout.splitlines() if "activation_checkpointing" in line]
    assert line.startswith("engine.activation_checkpointing: none, for the heaviest pack (")
    assert "activation_checkpointing" not in outcomes["told"][0].stdout
    assert outcomes["told"][0].code == 0
