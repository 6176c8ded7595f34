from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.config import StageConfig
from llava_train.data.order import step_samples
from llava_train.data.problems import DataError
from llava_train.inspect.plan import (
    DEVICES,
    as_record,
    bytes_of,
    make_plan,
    pack_some,
    usable,
)
from llava_train.inspect.plan_lengths import Lengths, PlanError, assume_lengths
from llava_train.inspect.plan_table import print_plan
from llava_train.stage_file import parse_stage
from llava_train.train.device_peaks import peak_flops
from llava_train.train.memory import GIB
from tests.tiny import dataset_of, stage, stage_content, tiny_llava, write_data


def tiny_stage(data: Path, **changes: Any) -> StageConfig:
    batch = {"size": 6, "max_tokens": 400, "max_sample_tokens": 300}
    return stage(data, **{"batch": batch, "engine": {"zero": 2, "precision": "bf16"}, **changes})


def tiny_stage_of(data: list[dict[str, Any]]) -> StageConfig:
    return parse_stage({**stage_content(Path("x"), name="planned"), "data": data}, "test")


def test_packs_and_steps_are_those_of_the_run(tmp_path: Path) -> None:
    data = write_data(tmp_path, 15)
    batch = {"size": 6, "max_tokens": 700, "max_sample_tokens": 600}
    plan = make_plan(tiny_stage(data, batch=batch, schedule={"epochs": 2}), n_ranks=2, memory=80 * GIB)
    assert plan.n_steps == 2 * 3
    of_ranks = [dataset_of(tiny_llava(), data, max_tokens=700, n_ranks=2, rank=rank) for rank in (0, 1)]
    steps = [[dataset[step] for step in range(3)] for dataset in of_ranks]
    assert plan.packing.micro_steps == np.mean([len(step.micro_batches) for step in steps[0]])
    assert plan.packing.tokens == np.mean([one.n_tokens + other.n_tokens for one, other in zip(*steps, strict=True)])
    assert plan.lengths.origin == "measured on all 15 samples"


def test_hours_are_the_flops_of_the_costliest_rank_over_the_assumed_speed(tmp_path: Path) -> None:
    config = tiny_stage(write_data(tmp_path, 12))
    plan = make_plan(config, 1, 80 * GIB, tflops=100, mfu=0.5)
    assert plan.hours == pytest.approx(2 * plan.packing.critical_flops / 50e12 / 3600)
    assert make_plan(config, 1, 80 * GIB, tflops=50, mfu=0.5).hours == pytest.approx(2 * plan.hours)


def test_where_there_are_no_data_lengths_are_assumed_and_it_says_so(tmp_path: Path) -> None:
    plan = make_plan(tiny_stage(tmp_path / "none.json"), 1, 80 * GIB)
    assert plan.lengths.origin.startswith("ASSUMED, conversations of 250 text tokens")
    assert "none.json" in plan.lengths.origin
    assert plan.n_steps is None and plan.hours is None


def test_published_data_have_their_steps_before_the_download(tmp_path: Path) -> None:
    batch = {"size": 128, "max_tokens": 4096, "max_sample_tokens": 2048}
    config = tiny_stage(tmp_path / "llava_v1_5_mix665k.json", batch=batch)
    assert make_plan(config, 8, 80 * GIB).n_steps == 5198


@pytest.mark.parametrize(("take", "n_samples"), [("first 1280", 1280), (0.5, 332_649), ("repeat 2", 1_330_596)])
def test_of_published_data_an_epoch_has_what_take_says(take: str | float, n_samples: int, tmp_path: Path) -> None:
    data = [{"path": str(tmp_path / "llava_v1_5_mix665k.json"), "take": take}]
    assert assume_lengths(tiny_stage_of(data), 4, "a reason").n_samples == n_samples


def test_data_that_are_there_and_cannot_be_used_are_refused_as_the_run_does(tmp_path: Path) -> None:
    empty, cut_off = tmp_path / "empty.json", tmp_path / "cut_off.json"
    empty.write_text("[]")
    cut_off.write_text('[{"id": "a"}, {"id"')
    for path in (empty, cut_off):
        with pytest.raises(DataError, match=path.name):
            make_plan(tiny_stage(path), 1, 80 * GIB)
        with pytest.raises(DataError, match=path.name):
            make_plan(tiny_stage_of([{"path": str(tmp_path / "none.json")}, {"path": str(path)}]), 1, 80 * GIB)
    without_pictures = [{"path": str(cut_off), "images": str(tmp_path / "later.zip")}]
    with pytest.raises(DataError, match="cut_off.json"):
        make_plan(tiny_stage_of(without_pictures), 1, 80 * GIB)
    short = [{"path": str(write_data(tmp_path, 3)), "take": "first 5"}]
    with pytest.raises(DataError, match="take first 5"):
        make_plan(tiny_stage_of(short), 1, 80 * GIB)


def test_lengths_are_assumed_where_the_pictures_are_not_there_yet(tmp_path: Path) -> None:
    data = [{"path": str(write_data(tmp_path, 3)), "images": str(tmp_path / "later.zip")}]
    assert make_plan(tiny_stage_of(data), 1, 80 * GIB).lengths.origin.startswith("ASSUMED")


def test_in_float32_hours_are_unknown_without_tflops_and_it_says_why(tmp_path: Path) -> None:
    config = tiny_stage(write_data(tmp_path, 12), engine={"zero": 2, "precision": "fp32"})
    plan = make_plan(config, 1, 80 * GIB)
    assert plan.hours is None and "H100 in fp32" in plan.speed and "--tflops" in plan.speed
    console = Console(record=True, width=200)
    print_plan(console, plan)
    assert f"unknown: {plan.speed}" in console.export_text()
    assert make_plan(config, 1, 80 * GIB, tflops=60).hours is not None


@pytest.mark.parametrize("tflops", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_is_none_is_refused(tflops: float, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--tflops"):
        make_plan(tiny_stage(write_data(tmp_path, 6)), 1, 80 * GIB, tflops=tflops)


def test_assumed_captions_are_shorter_than_conversations_and_none_is_over_long() -> None:
    config = tiny_stage(Path("x"))
    plain = config.model_copy(update={"model": config.model.model_copy(update={"chat_template": "plain"})})
    captions, conversations = (assume_lengths(one, 4, "a reason") for one in (plain, config))
    assert captions.n_tokens.mean() < conversations.n_tokens.mean() / 3
    assert conversations.n_tokens.max() <= 300
    assert captions.n_images.all() and not conversations.n_images.all()


def test_samples_that_cannot_be_read_are_left_out() -> None:
    config = tiny_stage(Path("x"))
    n_tokens = np.array([0, 50, 60, 0, 70, 80])
    lengths = Lengths(n_tokens, n_tokens // 2, np.zeros_like(n_tokens), 6, "")
    packing = pack_some(config, lengths, 1, 32, None)
    assert packing.tokens == n_tokens[step_samples(0, 0, 6, 6)].sum()
    assert packing.critical_flops is None
    with pytest.raises(PlanError, match="llava-train check"):
        pack_some(config, Lengths(n_tokens * 0, n_tokens, n_tokens, 6, ""), 1, 32, None)


def test_what_does_not_fit_has_a_first_change_that_makes_it_fit(tmp_path: Path) -> None:
    config = tiny_stage(write_data(tmp_path, 12), batch={"size": 12, "max_tokens": 3000, "max_sample_tokens": 300})
    roomy = make_plan(config, 2, 80 * GIB)
    assert roomy.fits and roomy.remedy is None and roomy.estimate.recompute == "none"
    full = make_plan(config, 2, roomy.estimate.context + 100)
    assert not full.fits and full.estimate.recompute == "full" and full.remedy is None
    short = make_plan(config, 2, int(full.estimate.total_bytes / 0.94) - 2**20 // 2)
    assert short.remedy is not None and short.remedy.changes == ("batch.max_tokens=900",)
    assert short.remedy.estimate.total_bytes <= usable(short.memory)


def test_the_command_prints_json_and_ends_with_1_where_it_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(stage_content(write_data(tmp_path, 12))))
    arguments = ["plan", "--config", str(path), "--gpus", "2", "--json"]
    fits = CliRunner().invoke(app, [*arguments, "--memory", "80G"])
    assert fits.exit_code == 0, fits.output
    record = json.loads(fits.stdout.splitlines()[-1])
    assert record["fits"] and record["gpus"] == 2 and record["n_steps"] == 2
    assert sum(record["estimate"]["by_kind"].values()) == record["estimate"]["total_bytes"]
    tight = CliRunner().invoke(app, [*arguments, "--memory", "0.1G"])
    assert tight.exit_code == 1
    assert json.loads(tight.stdout.splitlines()[-1])["fits"] is False


def test_the_table_has_every_kind_the_total_and_the_change(tmp_path: Path) -> None:
    plan = make_plan(tiny_stage(write_data(tmp_path, 12)), 2, GIB)
    console = Console(record=True, width=200)
    print_plan(console, plan)
    text = console.export_text()
    assert all(kind in text for kind in plan.estimate.by_kind())
    assert "It does not fit" in text and as_record(plan)["fits"] is False


@pytest.mark.parametrize("text", ["80G", "80GB", "80 GiB", "80"])
def test_memory_is_read_as_gib(text: str) -> None:
    assert bytes_of(text) == 80 * GIB


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "inf", "1e400", "nan"])
def test_memory_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--memory"):
        bytes_of(text)


def test_every_short_name_of_a_device_has_a_peak(tmp_path: Path) -> None:
    assert all(peak_flops(name) for name in DEVICES.values())
    with pytest.raises(PlanError, match="--tflops"):
        make_plan(tiny_stage(write_data(tmp_path, 6)), 1, GIB, device="abacus")
