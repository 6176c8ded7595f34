"""What a line of metrics.jsonl says of speed: of a window made by hand, and of runs on one and on two ranks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.data.loader import StepBatch
from llava_train.train import stopwatch
from llava_train.train import window as of_window
from llava_train.train.grad_norm import GradNorm
from llava_train.train.histograms import Histograms
from llava_train.train.metrics import PackWork, Yardstick, model_flops
from llava_train.train.window import SHARES, Window
from llava_train.train.world import World
from tests.tiny import dataset_of, tiny_llava, write_data
from tests.train.helpers import Clock, read_lines, run_many, write_samples, write_stage

ENGINE: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), skipped_steps=0)
WORLD = World(0, 1, torch.device("cpu"))
SUMS = torch.ones(1, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)


def test_rates_are_those_of_the_steps_since_the_last_line(tmp_path: Path) -> None:
    llava = tiny_llava()
    flops = model_flops(llava.model, llava.n_image_tokens)
    yardstick = Yardstick(flops, 1e12, llava.n_image_tokens, llava.model.config.image_token_id)
    window = Window(("x",), 0, yardstick)
    dataset = dataset_of(llava, write_data(tmp_path, 12))
    works = []
    for first in (0, 1):
        batch = dataset[first]
        time.sleep(0.02)
        window.add(batch, WORLD, SUMS, GradNorm(1.0), True)
        works.append(sum(map(yardstick.measure, batch.micro_batches), start=PackWork()))
        if first == 0:
            before = window.metrics(ENGINE, WORLD, 1, 2)
            window = window.next()
    line = window.metrics(ENGINE, WORLD, 2, 2)
    for work, metrics in zip(works, (before, line), strict=True):
        elapsed_s = metrics["step_s"]
        counted = [metrics[key] * elapsed_s for key in ("tokens_per_s", "text_tokens_per_s", "images_per_s")]
        assert counted == pytest.approx([work.n_tokens, work.n_text_tokens, work.n_images])
        assert metrics["tflops_per_s"] * 1e12 * elapsed_s == pytest.approx(work.flops)
        assert metrics["mfu"] == pytest.approx(metrics["tflops_per_s"])
        assert metrics["padding_share"] == 0
        assert metrics["peak_memory_bytes"] > 50e6


def test_shares_are_of_the_time_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (of_window, stopwatch):
        monkeypatch.setattr(module, "time", clock)
    window = Window(("x",), started=clock.now_s)
    for _ in range(2):
        with window.watch("copy"):
            clock.sleep(1.0)
        with window.watch("forward"):
            clock.sleep(2.0)
        with window.watch("backward"):
            clock.sleep(3.0)
            with window.watch("reduction"):
                clock.sleep(4.0)
        with window.watch("optimizer"):
            clock.sleep(5.0)
        window.data_wait_s += 6.0
        clock.sleep(9.0)
        window.add(StepBatch(0, (), (1,), ()), WORLD, SUMS, GradNorm(1.0), True)
    line = window.metrics(ENGINE, WORLD, 2, 2)
    assert (line["step_s"], line["data_wait_s"]) == (24.0, 6.0)
    shares = {"data_wait": 6, "copy": 1, "forward": 2, "backward": 3, "optimizer": 9}
    assert {name: line[f"{name}_share"] for name in SHARES} == pytest.approx({n: s / 24 for n, s in shares.items()}), (
        "the sum over ranks counts once"
    )
    window = window.next()
    clock.sleep(1.0)
    window.add(StepBatch(1, (), (1,), ()), WORLD, SUMS, GradNorm(1.0), True)
    after = window.metrics(ENGINE, WORLD, 3, 3)
    assert (after["copy_share"], after["optimizer_share"]) == (0, 0)


def test_after_an_interruption_rates_are_those_since(tmp_path: Path) -> None:
    llava = tiny_llava()
    batch = dataset_of(llava, write_data(tmp_path, 6))[0]
    stopped = Window(("x",))
    stopped.add(batch, WORLD, SUMS, GradNorm(1.0), True)
    window = Window(("x",))
    window.restore(stopped.state(WORLD), WORLD)
    time.sleep(0.01)
    window.add(batch, WORLD, SUMS, GradNorm(1.0), True)
    line = window.metrics(ENGINE, WORLD, 2, 2)
    assert line["sources"]["x"]["n_samples"] == 12
    assert line["samples_per_s"] * line["step_s"] == pytest.approx(6)
    assert line["tokens_per_s"] * line["step_s"] == pytest.approx(batch.n_tokens)
    assert sum(line["sample_lengths"]) == 12
    assert sum(line["pack_fill"]) == 2 * len(batch.micro_batches)


def test_checkpoints_of_before_histograms_are_restored() -> None:
    stopped = Window(("x",))
    stopped.add(StepBatch(0, (), (1,), ()), WORLD, SUMS, GradNorm(1.0), True)
    state = stopped.state(WORLD)
    del state["histograms"]
    window = Window(("x",))
    window.restore(state, WORLD)
    assert window.n_samples == [1]
    assert window.histograms == Histograms()


def test_what_is_not_known_is_null() -> None:
    window = Window(("x",))
    window.add(StepBatch(0, (), (1,), ()), WORLD, SUMS, GradNorm(1.0), True)
    line = window.metrics(ENGINE, WORLD, 1, 1)
    assert (line["tflops_per_s"], line["mfu"]) == (None, None)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Lines of the same run on one and on two ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("window")
    write_samples(folder / "data.json", "itmittii" + "x")
    stage = {
        "on_bad_sample": "skip",
        "max_bad_share": 1.0,
        "logging": {"every": 1},
        "batch": {"size": 3, "max_tokens": 600, "max_sample_tokens": 600},
    }
    found = {}
    for n_ranks in (1, 2):
        command = ["--config", write_stage(folder / f"run-{n_ranks}.yaml", **stage)]
        [outcome, *_] = run_many({"run": command}, folder, n_ranks)["run"]
        assert outcome.code == 0, outcome.stderr
        found[n_ranks] = read_lines(folder / f"runs/run-{n_ranks}/metrics.jsonl")
    return found


def test_the_number_of_ranks_changes_no_count(lines: dict[int, list[dict[str, Any]]]) -> None:
    alone, both = lines[1], lines[2]
    assert len(alone) == len(both) == 3
    for one, two in zip(alone, both, strict=True):
        for key in ("tokens_per_s", "text_tokens_per_s", "images_per_s", "samples_per_s"):
            assert two[key] * two["step_s"] == pytest.approx(one[key] * one["step_s"]), key
        assert 2 * two["tflops_per_s"] * two["step_s"] == pytest.approx(one["tflops_per_s"] * one["step_s"])
        assert one["text_tokens_per_s"] < one["tokens_per_s"]
        assert one["sample_lengths"] == two["sample_lengths"]
        assert math.hypot(*two["grad_norms"].values()) == pytest.approx(two["grad_norm"], rel=1e-5)
        assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-3)
    assert [sum(line["pack_fill"]) for line in alone] == [1, 1, 1]
    assert [sum(line["pack_fill"]) for line in both] == [2, 2, 2]
    assert sum(line["padding_share"] > 0 for line in alone) == 1, "the sample whose picture is missing"
    n_samples = [sum(line["sample_lengths"]) for line in alone]
    assert sorted(n_samples) == [2, 3, 3], "it is no sample"


def test_shares_and_memory_of_a_run_are_possible(lines: dict[int, list[dict[str, Any]]]) -> None:
    for line in lines[1] + lines[2]:
        shares = [line[f"{part}_share"] for part in SHARES]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) <= 1
        assert line["mfu"] is None
        assert 100e6 < line["peak_memory_bytes"] < 100e9
