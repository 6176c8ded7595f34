from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.config import StageConfig
from llava_train.data.order import step_samples
from llava_train.data.problems import DataError
from llava_train.inspect.plan import (
    DEVICES,
    Plan,
    Speed,
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
from tests.train.helpers import environment


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


def printed(plan: Plan) -> str:
    console = Console(record=True, width=200)
    print_plan(console, plan)
    return console.export_text()


def test_float32_has_hours_by_a_peak_of_its_own(tmp_path: Path) -> None:
    data = write_data(tmp_path, 12)
    fp32, bf16 = (tiny_stage(data, engine={"zero": 2, "precision": one}) for one in ("fp32", "bf16"))
    for device in DEVICES:
        plan = make_plan(fp32, 1, 80 * GIB, device)
        peak = peak_flops(DEVICES[device], "fp32")
        assert plan.hours == pytest.approx(plan.n_steps * plan.packing.critical_flops / (0.4 * peak) / 3600)
    assert "at 40% of 66.9 TFLOP/s (H100 in fp32), assumed" in printed(make_plan(fp32, 1, 80 * GIB))
    assert "at 40% of 989 TFLOP/s (H100 in bf16), assumed" in printed(make_plan(bf16, 1, 80 * GIB))


def test_a_cpu_has_no_peak_and_the_plan_says_how_to_know_its_hours(tmp_path: Path) -> None:
    config = tiny_stage(write_data(tmp_path, 12))
    plan = make_plan(config, 1, 80 * GIB, "cpu")
    assert plan.hours is None and "--measure" in plan.speed and "CUDA" not in plan.estimate.by_kind()
    text = printed(plan)
    assert f"unknown: {plan.speed}" in text and "Memory of the process on the CPU" in text
    assert make_plan(config, 1, 80 * GIB, "cpu", tflops=0.1).hours is not None


@pytest.mark.parametrize(
    ("tflops", "mfu", "told"),
    [
        (0.1, 0.4, "40% of 0.1 TFLOP/s"),
        (0.00125, 0.015, "1.5% of 0.00125 TFLOP/s"),
        (989.4, 0.375, "37.5% of 989 TFLOP/s"),
        (2250, 1.0, "100% of 2,250 TFLOP/s"),
    ],
)
def test_no_figure_is_rounded_to_nothing(tflops: float, mfu: float, told: str, tmp_path: Path) -> None:
    batch = {"size": 2, "max_tokens": 60_000, "max_sample_tokens": 300}
    config = tiny_stage(write_data(tmp_path, 12), batch=batch)
    text = printed(make_plan(config, 1, 80 * GIB, tflops=tflops, mfu=mfu))
    assert told in text
    assert "<1% of batch.max_tokens" in text
    assert not re.search(r"(?<![\d.,])0(\.0)?(%| GiB| MiB| TFLOP| h| min)", text)


def test_measured_steps_give_the_hours_of_every_number_of_ranks(tmp_path: Path) -> None:
    config = tiny_stage(write_data(tmp_path, 12))
    by_flops = make_plan(config, 1, 80 * GIB, "CPU", measured=Speed("3 s a step", 1e9, 3.0))
    assert by_flops.hours == pytest.approx(2 * by_flops.packing.critical_flops / 1e9 / 3600)
    assert "at 3 s a step" in printed(by_flops)
    by_steps = make_plan(config, 2, 80 * GIB, "CPU", measured=Speed("3 s a step", None, 3.0))
    assert by_steps.hours == pytest.approx(2 * 3.0 / 2 / 3600)


def test_steps_that_the_data_do_not_have_are_told(tmp_path: Path) -> None:
    plan = make_plan(tiny_stage(write_data(tmp_path, 12), schedule={"max_steps": 40}), 1, 80 * GIB)
    note = "schedule.max_steps 40 is not reached: 1 epoch has 2 steps; raise schedule.epochs to 20"
    assert plan.n_steps == 2 and f"Note: {note}" in printed(plan) and as_record(plan)["notes"] == [note]
    unknown = make_plan(tiny_stage(tmp_path / "none.json", schedule={"max_steps": 40}), 1, 80 * GIB)
    assert "40 at most, as the number of samples is not known" in printed(unknown)


def test_the_heaviest_pack_is_one_of_the_measured_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path, 40)
    batch = {"size": 6, "max_tokens": 4096, "max_sample_tokens": 1000}
    plan = make_plan(tiny_stage(data, batch=batch), 1, 80 * GIB)
    longest = np.sort(plan.lengths.n_tokens)[-6:]
    assert plan.estimate.pack.n_tokens == longest.sum() < 4096 and plan.estimate.pack.n_images <= 6
    assert max(plan.estimate.pack.lengths) == longest.max()
    monkeypatch.setattr("llava_train.inspect.plan_lengths.MOST_MEASURED", 39)
    monkeypatch.setattr("llava_train.inspect.plan_lengths._N_MEASURED", 20)
    some = make_plan(tiny_stage(data, batch=batch), 1, 80 * GIB)
    assert some.lengths.origin == "measured on 20 of 40 samples" and some.estimate.pack.n_tokens == 4096


def test_only_the_samples_that_a_run_trains_on_are_measured(tmp_path: Path) -> None:
    data, batch = write_data(tmp_path, 40), {"size": 6, "max_tokens": 4096, "max_sample_tokens": 1000}
    plan = make_plan(tiny_stage(data, batch=batch, schedule={"max_steps": 3}), 1, 80 * GIB)
    assert plan.lengths.origin == "measured on the 18 that it trains on, of 40 samples"
    steps = [dataset_of(tiny_llava(), data, max_tokens=4096)[step] for step in range(3)]
    assert plan.packing.tokens == np.mean([step.n_tokens for step in steps])
    heaviest = max(pack.input_ids.numel() for step in steps for pack in step.micro_batches)
    assert heaviest <= plan.estimate.pack.n_tokens == np.sort(plan.lengths.n_tokens)[-6:].sum()


def test_assumed_lengths_are_no_bound(tmp_path: Path) -> None:
    """Not even where as many are assumed as an epoch has."""
    data = [{"path": str(tmp_path / "llava_v1_5_mix665k.json"), "take": "first 2000"}]
    plan = make_plan(tiny_stage_of(data), 1, 80 * GIB)
    assert plan.lengths.n_samples == len(plan.lengths.n_tokens) and plan.estimate.pack.n_tokens == 2048


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
    lengths = Lengths(n_tokens, n_tokens // 2, np.zeros_like(n_tokens), 6, "", numbers=np.arange(6))
    packing = pack_some(config, lengths, 1, 32, None)
    assert packing.tokens == n_tokens[step_samples(0, 0, 6, 6)].sum()
    assert packing.critical_flops is None
    with pytest.raises(PlanError, match="llava-train check"):
        pack_some(config, Lengths(n_tokens * 0, n_tokens, n_tokens, 6, ""), 1, 32, None)


def test_what_does_not_fit_has_a_first_change_that_makes_it_fit(tmp_path: Path) -> None:
    batch = {"size": 12, "max_tokens": 3000, "max_sample_tokens": 300, "over_long": "truncate"}
    config = tiny_stage(write_data(tmp_path, 12), batch=batch)
    roomy = make_plan(config, 2, 80 * GIB)
    assert roomy.fits and roomy.remedy is None and roomy.estimate.recompute == "none"
    full = make_plan(config, 2, roomy.estimate.context + 100)
    assert not full.fits and full.estimate.recompute == "full" and full.remedy is None
    short = make_plan(config, 2, int(full.estimate.total_bytes / 0.94) - 2**20 // 2)
    assert short.remedy is not None and short.remedy.changes == (
        f"batch.max_tokens={full.estimate.pack.n_tokens // 2}",
    )
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


def test_the_command_measures_a_few_steps_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    engine = {"zero": 0, "precision": "fp32"}
    held_out = {"every": 1, "data": [{"path": "nowhere.json"}]}
    content = stage_content(write_data(tmp_path, 12), engine=engine, init_from="nowhere", eval=held_out)
    path.write_text(json.dumps({**content, "output": str(tmp_path / "runs")}))
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "llava_train", "plan", "--config", str(path), "--gpus", "2", "--measure", "--json"]
    done = subprocess.run(command, env=environment(**hidden), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["hours"] > 0 and record["device"] == "cpu" and 0 < record["memory_bytes"] < 2**45
    assert re.search(
        r"^[\d.,]+ s a step on this machine's CPU in fp32 \([\d.]+ TFLOP/s, measured over \d", record["speed"]
    )
    assert "what 2 of them exchange is not counted" in record["speed"]
    assert not (tmp_path / "runs/tiny").exists()


@pytest.mark.parametrize("option", [["--device", "H100"], ["--tflops", "5"]])
def test_what_is_measured_is_not_told_too(option: list[str], tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(stage_content(write_data(tmp_path, 12))))
    done = CliRunner().invoke(app, ["plan", "--config", str(path), "--measure", *option])
    assert done.exit_code == 2 and "leave --device and --tflops out" in done.stderr


def test_a_cpu_is_planned_with_the_memory_that_is_free_here(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(json.dumps(stage_content(write_data(tmp_path, 12))))
    done = CliRunner().invoke(app, ["plan", "--config", str(path), "--device", "CPU", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["memory_bytes"] <= psutil.virtual_memory().total


def test_every_short_name_of_a_device_has_a_peak(tmp_path: Path) -> None:
    assert all(peak_flops(name) for name in DEVICES.values())
    with pytest.raises(PlanError, match="--tflops"):
        make_plan(tiny_stage(write_data(tmp_path, 6)), 1, GIB, device="abacus")
