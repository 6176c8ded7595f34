"""A run's folder has one owner at a time, and one stage file."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from llava_train.config import StageConfig
from llava_train.data.mixture import open_mixture
from llava_train.files import write_manifest
from llava_train.stage_file import load_stage, with_suffix
from llava_train.train import run_folder
from llava_train.train.run_folder import (
    RunFolderError,
    changes,
    check_unchanged,
    config_hash,
    describe,
    held,
    read_card,
    write_card,
)
from tests.train.helpers import Outcome, environment, read_lines, run_many, stage_content, write_samples, write_stage

HOLDS = """
import sys, time
from pathlib import Path
from llava_train.train.run_folder import held
with held(Path("run"), Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(9999)
"""


def hold(lock_file: Path) -> subprocess.Popen[str]:
    """A process that works in a folder."""
    command = [sys.executable, "-c", HOLDS, str(lock_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(SLURM_JOB_ID="4711"))
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_whose_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_PATIENCE_S", 0.0)
    first = hold(tmp_path / ".cache/run.lock")
    try:
        with pytest.raises(
            RunFolderError, match=rf"^run is in use by process {first.pid} of .* on .*, SLURM job 4711, since 2"
        ):
            held(Path("run"), tmp_path / ".cache/run.lock").__enter__()
    finally:
        first.kill()
        first.wait()


def test_a_process_that_is_about_to_end_is_waited_for_and_a_killed_one_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, pauses = hold(tmp_path / ".cache/run.lock"), []

    def killed_meanwhile(pause_s: float) -> None:
        pauses.append(pause_s)
        first.send_signal(signal.SIGKILL)
        first.wait()

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=killed_meanwhile))
    with held(Path("run"), tmp_path / ".cache/run.lock"):
        assert json.loads((tmp_path / ".cache/run.lock").read_text())["pid"] == os.getpid()
    assert len(pauses) == 1


def test_storage_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with held(Path("run"), tmp_path / "run.lock"):
        assert "cannot be locked (Function not implemented); start no second run in it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"output: cannot write to .*file/.cache/run.lock: Not a directory"):
        held(Path("run"), tmp_path / "file/.cache/run.lock").__enter__()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run-folder")
    write_samples(folder / "data.json", "ittimt")
    write_stage(folder / "tiny.yaml", data=[{"path": str(folder / "data.json")}], schedule={"epochs": 9})
    return folder


def card_of(folder: Path, *overrides: str) -> dict[str, Any]:
    config = load_stage(folder / "tiny.yaml", overrides)
    return describe(config, open_mixture(config.data, config.seed))


@pytest.mark.parametrize(
    "override",
    [
        "batch.max_tokens=4096",
        "batch.packing=false",
        "engine.zero=3",
        "engine.activation_checkpointing=true",
        "engine.hang_timeout_s=60",
        "loader.workers=3",
        "checkpoint.every=7",
        "logging.every=3",
        "output=elsewhere",
        "max_bad_steps=9",
        "max_bad_share=0.9",
        "on_bad_sample=skip",
        "batch.over_long=drop",
    ],
)
def test_speed_knobs_and_what_errors_tell_to_do_may_change(override: str, folder: Path) -> None:
    assert changes(card_of(folder), card_of(folder, override)) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("batch.size=8", "batch.size: 4 -> 8"),
        ("seed=1", "seed: 0 -> 1"),
        ("schedule.max_steps=9", "schedule.max_steps: null -> 9"),
        ("trainable.projector.lr=0.5", "trainable.projector.lr: 0.002 -> 0.5"),
        ("engine.precision=bf16", "engine.precision: fp32 -> bf16"),
        ("model.chat_template=vicuna_v1", "model.chat_template: chatml -> vicuna_v1"),
        ("batch.max_sample_tokens=99", "batch.max_sample_tokens: 1024 -> 99"),
    ],
)
def test_what_decides_the_result_is_told_key_by_key(override: str, line: str, folder: Path) -> None:
    before = card_of(folder)
    line = line.replace("0.002", str(before["trainable"]["projector"]["lr"]))
    assert changes(before, card_of(folder, override)) == [line]
    assert config_hash(before) != config_hash(card_of(folder, override))


def test_policies_may_leave_error_but_not_change_otherwise(folder: Path) -> None:
    dropped, cut = card_of(folder, "batch.over_long=drop"), card_of(folder, "batch.over_long=truncate")
    assert changes(dropped, cut) == ["batch.over_long: drop -> truncate"]


def test_other_content_of_the_data_under_the_same_name_is_a_change(folder: Path, tmp_path: Path) -> None:
    write_samples(tmp_path / "data.json", "ittimt")
    write_stage(tmp_path / "tiny.yaml", data=[{"path": str(tmp_path / "data.json")}])
    before = card_of(tmp_path)
    write_samples(tmp_path / "data.json", "ittimt", seed=1)
    (found,) = changes(before, card_of(tmp_path))
    assert found.startswith("content of data.0: ")
    assert changes(before, describe(load_stage(tmp_path / "tiny.yaml"))) == []  # data of a finished run may be gone


@pytest.mark.parametrize("missing", [None, "max_bad_steps", "eval", "loader", "seed"])
def test_a_card_that_was_read_back_is_the_same_also_from_before_a_key_existed(
    missing: str | None, tmp_path: Path
) -> None:
    card = {**describe(StageConfig.model_validate(stage_content())), "about": {"data": []}}
    write_card(tmp_path, card, n_ranks=1, step=0, changed=False)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    written.pop(missing, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    read = read_card(tmp_path)
    assert read is not None
    assert changes(read, card) == []


def test_another_start_under_the_same_name_is_a_change(folder: Path, tmp_path: Path) -> None:
    config = load_stage(folder / "tiny.yaml", [f"init_from={tmp_path}"])
    mixture, cards = open_mixture(config.data, config.seed), []
    for weights in ("one", "two"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/weights").write_text(weights)
        write_manifest(tmp_path / "model")
        cards.append(describe(config, mixture))
    (found,) = changes(*cards)
    assert found.startswith("content of init_from: ")


def result_of(run: Path, weights: str = "one") -> None:
    (run / "model").mkdir(parents=True, exist_ok=True)
    (run / "model/weights").write_text(weights)
    write_manifest(run / "model")


def started(folder: Path, init_from: str, *overrides: str) -> dict[str, Any]:
    """The card of a run that starts from another one, as it is read back."""
    card = card_of(folder, f"init_from={init_from}", "name=two", *overrides)
    write_card(folder / "card", card, n_ranks=1, step=0, changed=False)
    read = read_card(folder / "card")
    assert read is not None
    return read


def test_a_run_that_names_its_start_in_another_way_is_the_same_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs begun with a path, as before runs had names, or with `~`, continue."""
    shutil.copytree(folder / "images", tmp_path / "images")
    for name in ("tiny.yaml", "data.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    result_of(tmp_path / "runs/one")
    ways = ["one", "runs/one", "./runs/one/", "~/runs/one", str(tmp_path / "runs/one")]
    cards = [started(tmp_path, way) for way in ways]
    cards.append(started(tmp_path, "one", "output=~/runs"))
    cards.append(started(tmp_path, "one", "data.0.path=~/data.json", f"data.0.images={tmp_path}"))
    cards.append(started(tmp_path, "one", "data.0.path=data.json", "data.0.images=."))
    assert [changes(a, b) for a in cards[:6] for b in cards[:6]] == [[]] * 36
    assert changes(cards[6], cards[7]) == []
    finished = describe(load_stage("tiny.yaml", ["init_from=one", "name=two"]))
    assert changes(cards[1], finished) == []
    shutil.rmtree("runs/one")  # of a finished run, what it began with may be gone
    assert changes(cards[1], finished) == []
    assert changes(cards[0], describe(load_stage("tiny.yaml", ["init_from=runs/one", "name=two"]))) == []


def test_runs_that_were_moved_with_their_start_are_the_same_and_other_starts_are_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result_of(tmp_path / "runs/one")
    result_of(tmp_path / "runs/other", "two")
    before = card_of(folder, "init_from=runs/one", "name=two")
    other = card_of(folder, "init_from=other", "name=two")
    assert [line.partition(": ")[0] for line in changes(before, other)] == ["content of init_from", "init_from"]
    shutil.move("runs", "big-disk")
    moved = card_of(folder, "init_from=one", "name=two", "output=big-disk")
    assert changes(before, moved) == []


def test_a_lost_card_of_a_run_that_began_from_a_path_is_no_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result_of(tmp_path / "runs/one")
    saved = config_hash(card_of(folder, "init_from=runs/one", "name=two"))
    now = card_of(folder, "init_from=one", "name=two")
    assert check_unchanged(tmp_path / "runs/two", now, saved, allowed=False) == []


def test_a_name_is_a_run_first_then_a_path_then_a_hub_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def start(init_from: str, *overrides: str) -> str | None:
        return load_stage(folder / "tiny.yaml", [f"init_from={init_from}", *overrides]).start

    assert (start("random"), start("org/one"), start("one")) == (None, "org/one", "one")
    (tmp_path / "one").mkdir()
    assert start("one") == "one", "a path"
    (tmp_path / "runs/one").mkdir(parents=True)
    assert (start("one"), start("./one"), start("runs/one")) == ("runs/one", "./one", "runs/one")
    assert start("one", "output=X") == "one"
    assert start("one", "name=one") == "one", "a run cannot start from itself"


def test_a_lost_card_is_noticed_by_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    card = card_of(folder)
    assert check_unchanged(tmp_path, card, config_hash(card), allowed=False) == []
    with pytest.raises(RunFolderError, match=r"config.yaml is lost"):
        check_unchanged(tmp_path, card, config_hash(card_of(folder, "seed=5")), allowed=False)


def test_suffixed_stages_are_runs_of_their_own_that_follow_each_other(folder: Path) -> None:
    first = load_stage(folder / "tiny.yaml", ["name=one"])
    second = load_stage(folder / "tiny.yaml", ["name=two", "init_from=runs/one"])
    third = load_stage(folder / "tiny.yaml", ["name=three", "init_from=elsewhere/one"])
    fourth = load_stage(folder / "tiny.yaml", ["name=four", "init_from=one"])
    fifth = load_stage(folder / "tiny.yaml", ["name=five", "init_from=other"])
    suffixed = with_suffix([first, second, third, fourth, fifth], "7")
    assert [stage.name for stage in suffixed] == ["one-7", "two-7", "three-7", "four-7", "five-7"]
    assert [stage.init_from for stage in suffixed] == ["random", "runs/one-7", "elsewhere/one", "one-7", "other"]


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """A run of 4 steps that was interrupted after step 2, continued in several ways."""
    base: list[Any] = ["--config", folder / "tiny.yaml"]
    short = [*base, "--set", "schedule.max_steps=2", "checkpoint.every=2"]
    more = [*base, "--set", "schedule.max_steps=4", "checkpoint.every=2"]
    told = run_many(
        {
            "begun": [*short, "output=one"],
            "complete": [*short, "output=one", "loader.workers=1"],
            "complete, changed": [*short, "output=one", "batch.size=3"],
            "complete, allowed": [*short, "output=one", "batch.size=3", "--allow-config-change"],
            "complete, longer": [*more, "output=one"],
            "complete, longer, allowed": [*more, "output=one", "--allow-config-change"],
            "complete, epochs": [*short, "output=one", "schedule.epochs=12"],
            "a new name": [*more, "output=one", "name=tiny-2", "init_from=tiny"],
            "begun two": [*short, "output=two"],
        },
        folder,
    )
    (folder / "two/tiny/model/COMPLETE").unlink()
    first = hold(folder / "taken/.cache/tiny.lock")
    told |= run_many(
        {
            "taken": [*short, "output=taken"],
            "changed": [*more, "output=two", "trainable.projector.lr=0.5"],
            "fewer steps": [*more, "output=two", "schedule.max_steps=1", "--allow-config-change"],
            "allowed": [*more, "output=two", "trainable.projector.lr=0.5", "--allow-config-change"],
            "afterwards": [*more, "output=two", "trainable.projector.lr=0.5"],
        },
        folder,
    )
    first.kill()
    first.wait()
    return {name: outcome[0] for name, outcome in told.items()}


def test_a_changed_run_is_refused_with_the_keys(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["changed"]
    assert outcome.code == 2
    assert "was begun with another stage file or other data:" in outcome.stderr
    assert "or go on all the same with --allow-config-change" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "schedule.max_steps: 2 -> 4" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("complete, changed", "batch.size: 4 -> 3"),
        ("complete, allowed", "batch.size: 4 -> 3"),
        ("complete, longer", "schedule.max_steps: 2 -> 4"),
        ("complete, longer, allowed", "schedule.max_steps: 2 -> 4"),
        ("complete, epochs", "schedule.epochs: 9.0 -> 12.0"),
    ],
)
def test_a_finished_run_takes_no_more_steps_whatever_is_allowed(
    name: str, change: str, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[name]
    assert outcome.code == 2
    assert f"one/tiny is finished, and was trained with another stage file:\n  {change}\n" in outcome.stderr
    assert "--allow-config-change" not in outcome.stderr, "it would do nothing"
    assert "would change the learning rate, or the samples, of steps already taken" in outcome.stderr
    assert "write a new `name` and `init_from: tiny` in the stage file" in outcome.stderr


def test_a_finished_run_is_trained_on_under_a_new_name(folder: Path, outcomes: dict[str, Outcome]) -> None:
    assert outcomes["a new name"].code == 0, outcomes["a new name"].stderr
    assert "starts from  whole model from one/tiny/model" in outcomes["a new name"].stdout
    assert len(read_lines(folder / "one/tiny-2/metrics.jsonl")) == 4


def test_a_run_cannot_end_before_the_step_where_it_stands(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["fewer steps"].code == 2
    said = "two/tiny has taken 2 steps, and the stage file now asks for 1; ask for more"
    assert said in outcomes["fewer steps"].stderr


def test_a_second_run_in_the_same_folder_is_refused_and_told_whose_it_is(
    folder: Path, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes["taken"]
    assert outcome.code == 2
    assert "taken/tiny is in use by process " in outcome.stderr
    assert ", SLURM job 4711, since " in outcome.stderr
    assert "wait for it, stop it, or give this run another name" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (folder / "taken/tiny").exists()


def test_a_complete_run_is_passed_over(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["complete"].code == 0
    assert "tiny: complete, see one/tiny/model" in outcomes["complete"].stdout


def test_an_allowed_change_holds_from_then_on(folder: Path, outcomes: dict[str, Outcome]) -> None:
    outcome, run = outcomes["allowed"], folder / "two/tiny"
    assert outcome.code == 0, outcome.stderr
    assert "tiny: changed after step 2: schedule.max_steps: 2 -> 4" in outcome.stdout
    assert "resuming after step 2 of 4" in outcome.stdout
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    rates = [line["lr"]["projector"] for line in lines]
    assert max(rates[:2]) < 0.01 < max(rates[2:])
    assert yaml.safe_load((run / "config-until-step-00000002.yaml").read_text())["schedule"]["max_steps"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["max_steps"] == 4
    assert outcomes["afterwards"].code == 0
    assert "complete" in outcomes["afterwards"].stdout
