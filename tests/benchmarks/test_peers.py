"""The comparison with other trainers: what is the same for all, and what is made of their runs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_train.data.chat import IGNORED, EncodedSample
from llava_train.data.order import step_samples
from llava_train.model.processor import byte_tokenizer
from tests.scripts import ROOT, load_script

environments = load_script("benchmarks/peers/environments.py")
harness = load_script("benchmarks/peers/harness.py")
original_parts = load_script("benchmarks/original_parts.py")
peers = load_script("benchmarks/peers.py")
peers_report = load_script("benchmarks/peers_report.py")
shapes = load_script("benchmarks/peer_shapes.py")
workload = load_script("benchmarks/workload.py")


def test_llava_train_alone_prints_its_table_last_and_trains_on_what_was_planned():
    command = [sys.executable, "benchmarks/peers.py", "--peer", "none", "--shape", "tiny"]
    command += ["--warmup", "1", "--steps", "2", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rates, losses = done.stdout.strip().split("\n\n")[1:]
    name, samples_per_s, *_, same_steps = [cell.strip() for cell in rates.splitlines()[2].strip("|").split("|")]
    assert name.startswith("none") and same_steps == "yes"
    assert float(samples_per_s.split()[0]) > 0
    first, *_, last = [float(line.strip("|").split("|")[1]) for line in losses.splitlines()[2:]]
    assert first != last and first == pytest.approx(np.log(270), abs=0.5)  # random weights guess among the tokens


def test_unknown_peer_is_refused_with_the_known_ones():
    command = [sys.executable, "benchmarks/peers.py", "--peer", "axolotl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "axolotl is none of trl, llamafactory, llava, none" in done.stderr


def test_workload_is_the_same_for_the_same_seed_and_fits_every_reader(tmp_path: Path):
    made = [
        workload.make_workload(tmp_path / name, shapes.SHAPES["tiny"], 2, Path("parts"), 3, {"model", "original"})
        for name in ("a", "b")
    ]
    assert made[0] == made[1]
    samples, size = made[0]["samples"], made[0]["batch_size"]
    for_llava_train = json.loads((tmp_path / "a" / "data.json").read_text())
    order = [i for step in range(2) for i in step_samples(step, 3, len(samples), size)]
    assert [for_llava_train[i]["id"] for i in order] == [sample["id"] for sample in samples]
    tokens = json.loads((tmp_path / "a" / "original" / "tokens.json").read_text())["samples"]
    for sample in samples:
        n_images = tokens[sample["id"]]["input_ids"].count(-200)
        assert n_images == ("image" in sample)
        widened = len(tokens[sample["id"]]["input_ids"]) + n_images * (made[0]["n_image_tokens"] - 1)
        assert widened == sample["n_tokens"]


@given(n_tokens=st.integers(1, 300), seed=st.integers(0, 100))
def test_texts_have_the_wanted_number_of_tokens_or_one_fewer_for_a_space(n_tokens: int, seed: int):
    text = workload.text_of(n_tokens, _TOKENIZER, random.Random(seed))
    assert len(_TOKENIZER(text, add_special_tokens=False).input_ids) in (n_tokens, n_tokens - 1)
    assert text == text.strip() and text[0].isalpha()


_TOKENIZER = byte_tokenizer()


def test_an_image_becomes_one_mark_for_the_original():
    image, n_image_tokens = 9, 3
    input_ids = np.array([5, 9, 9, 9, 9, 9, 9, 7])
    labels = np.array([IGNORED] * 7 + [7])
    found = original_parts.tokens_of(EncodedSample(input_ids, labels, 2), image, n_image_tokens)
    assert found == {"input_ids": [5, -200, -200, 7], "labels": [IGNORED, IGNORED, IGNORED, 7]}


def _run(seconds: list[float], n_tokens: int = 100) -> dict[str, Any]:
    steps = [
        {"s": s, "loss": 1.0, "n_tokens": n_tokens, "n_supervised": 10, "n_computed": 2 * n_tokens} for s in seconds
    ]
    return {"steps": steps, "versions": {}, "peak_cuda_bytes": None, "peak_own_bytes": 1, "wall_s": 1.0}


def test_ratio_above_one_means_that_the_peer_is_slower_and_the_warmup_counts_for_neither():
    samples = [{"n_tokens": 50, "n_supervised": 5}] * 6
    runs = {"slow": [_run([99, 4, 4])], "none": [_run([1, 2, 2])], "broken": [{"error": "exit code 1", "log": ""}]}
    found = peers_report.summarize(runs, samples, batch_size=2, n_warmup=1)
    assert found["slow"]["ratio"] == 2.0 and found["none"]["ratio"] == 1.0
    assert found["slow"]["samples_per_s"] == 0.5  # 4 samples in 8 seconds
    assert found["slow"]["same_steps"] and found["slow"]["padding_share"] == 0.5
    assert found["broken"] == {"error": "exit code 1", "log": ""}


def test_steps_of_other_samples_are_told_from_the_planned_ones():
    samples = [{"n_tokens": 50, "n_supervised": 5}] * 4
    other = {"other": [_run([1, 1], n_tokens=101)], "fewer": [_run([1])]}
    found = peers_report.summarize(other, samples, batch_size=2, n_warmup=0)
    assert not found["other"]["same_steps"] and not found["fewer"]["same_steps"]
    assert "ratio" not in found["other"]


def test_a_run_that_ends_by_itself_while_it_is_stopped_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    def gone(*_: Any) -> None:
        calls.append("killpg")
        if len(calls) == 2:  # after its memory was measured once
            process.stdin.close()
        raise ProcessLookupError

    calls: list[str] = []
    monkeypatch.setattr(peers.os, "killpg", gone)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        assert peers._watch_memory(process, latest_end=0.0) > 0


def test_a_trainer_that_lacks_a_kernel_is_marked_in_the_table():
    found = {"versions": {"trl": "1.16.0"}, "lacks": ["flash-attn"]}
    assert peers_report._title("trl:8", found) == "trl:8 1.16.0 (without flash-attn)"
    run = {**_run([1]), "lacks": ["flash-attn"]}
    samples = [{"n_tokens": 50, "n_supervised": 5}] * 2
    assert peers_report.summarize({"trl": [run]}, samples, 2, 0)["trl"]["lacks"] == ["flash-attn"]
    assert harness.lacks("cpu") == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"device": "cuda", "lora": True, "amp": False}, (True, True)),
        ({"device": "cuda", "lora": False, "amp": False}, (True, False)),
        ({"device": "cpu", "lora": False, "amp": True}, (False, True)),
    ],
)
def test_adapters_on_a_gpu_are_computed_in_bfloat16(asked: dict[str, Any], expected: tuple[bool, bool]):
    assert harness.weights_and_autocast(bf16=True, **asked) == expected
    assert harness.weights_and_autocast(bf16=False, **asked) == (False, False)


def test_the_time_between_two_steps_counts_for_the_second(monkeypatch: pytest.MonkeyPatch):
    stamps = iter([0.0, 2.0, 7.0])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(stamps))
    clock = harness.StepClock("cpu")
    assert [clock.step_ended(), clock.step_ended()] == [2.0, 5.0]


def test_what_has_no_wheel_is_left_out_and_told(capsys: pytest.CaptureFixture[str]):
    environments._try([sys.executable, "-c", "raise SystemExit(3)"])
    assert "left out" in capsys.readouterr().err
    assert all(
        "flash-attn" in environments.ENVIRONMENTS[peer].on_cuda_if_it_builds for peer in environments.ENVIRONMENTS
    )
