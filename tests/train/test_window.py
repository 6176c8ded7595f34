"""What a line of metrics.jsonl says of speed: of a window made by hand, and of runs on one and on two ranks."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.data.loader import StepBatch
from llava_train.train.metrics import PackWork, Yardstick, model_flops
from llava_train.train.window import Window
from llava_train.train.world import World
from tests.tiny import dataset_of, tiny_llava, write_data
from tests.train.helpers import read_lines, run_many, write_samples, write_stage

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
        window.add(batch, WORLD, SUMS, 1.0, True)
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


def test_shares_are_of_the_time_of_the_steps() -> None:
    window = Window(("x",))
    for _ in range(2):
        with window.watch("copy"):
            time.sleep(0.01)
        with window.watch("optimizer"):
            time.sleep(0.03)
        window.data_wait_s += 0.02
        time.sleep(0.02)
        window.add(StepBatch(0, (), (1,), ()), WORLD, SUMS, 1.0, True)
    line = window.metrics(ENGINE, WORLD, 2, 2)
    assert line["data_wait_share"] == pytest.approx(line["data_wait_s"] / line["step_s"])
    assert 0 < line["copy_share"] < line["optimizer_share"]
    assert line["optimizer_share"] * line["step_s"] >= 0.03
    assert line["copy_share"] + line["optimizer_share"] + line["data_wait_share"] <= 1
    window = window.next()
    window.add(StepBatch(1, (), (1,), ()), WORLD, SUMS, 1.0, True)
    after = window.metrics(ENGINE, WORLD, 3, 3)
    assert (after["copy_share"], after["optimizer_share"]) == (0, 0)


def test_after_an_interruption_rates_are_those_since(tmp_path: Path) -> None:
    llava = tiny_llava()
    batch = dataset_of(llava, write_data(tmp_path, 6))[0]
    stopped = Window(("x",))
    stopped.add(batch, WORLD, SUMS, 1.0, True)
    window = Window(("x",))
    window.restore(stopped.state(WORLD), WORLD)
    time.sleep(0.01)
    window.add(batch, WORLD, SUMS, 1.0, True)
    line = window.metrics(ENGINE, WORLD, 2, 2)
    assert line["sources"]["x"]["n_samples"] == 12
    assert line["samples_per_s"] * line["step_s"] == pytest.approx(6)
    assert line["tokens_per_s"] * line["step_s"] == pytest.approx(batch.n_tokens)


def test_what_is_not_known_is_null() -> None:
    window = Window(("x",))
    window.add(StepBatch(0, (), (1,), ()), WORLD, SUMS, 1.0, True)
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
    assert sum(line["padding_share"] > 0 for line in alone) == 1, "the sample whose picture is missing"


def test_shares_and_memory_of_a_run_are_possible(lines: dict[int, list[dict[str, Any]]]) -> None:
    for line in lines[1] + lines[2]:
        shares = [line[f"{part}_share"] for part in ("data_wait", "copy", "optimizer")]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) < 1
        assert line["mfu"] is None
        assert 100e6 < line["peak_memory_bytes"] < 100e9
