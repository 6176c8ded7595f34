"""Cached features change nothing but the time: losses bit for bit, what is bad, what is left after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llava_train.config import StageConfig
from llava_train.data.feature_cache import FeatureCache, FeatureError
from llava_train.data.images import decode_image
from llava_train.data.loader import StepDataset
from llava_train.model.build import Llava
from llava_train.model.features import encode
from llava_train.train import precompute
from llava_train.train.interrupt import Preempted, StopRequests
from llava_train.train.precompute import cached_features
from llava_train.train.session import Session
from llava_train.train.world import World
from tests.tiny import dataset_of, stage, tiny_llava, write_data
from tests.train.helpers import Outcome, read_lines, run_many, stage_content, write_samples, write_stage

KINDS = "itximtbtiitmi"
"""Missing image 2, no picture 6; two pictures are also there under another name, see `folder`."""
STAGE_1 = {"projector": {"lr": 1e-3, "standardize": True}}
LORA = {
    "projector": {"lr": 1e-3},
    "language_model": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
}
JOINED = {"vision_feature_layer": [-3, -1], "vision_feature_select": "full"}
STAGES: dict[str, dict[str, Any]] = {
    "stage1-fp32": {"trainable": STAGE_1, "engine": {"zero": 0, "precision": "fp32"}},
    "stage1-bf16": {"trainable": STAGE_1, "engine": {"zero": 2, "precision": "bf16"}},
    "lora-bf16": {"trainable": LORA, "engine": {"zero": 0, "precision": "bf16"}},
    "lora-fp32": {"trainable": LORA, "engine": {"zero": 3, "precision": "fp32"}, "layers": JOINED},
}
"""ZeRO 3 comes last: it leaves another linear layer in torch.nn.functional, which rounds otherwise in bf16."""
N_STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage files over several epochs, with evaluation, that read with two workers."""
    folder = tmp_path_factory.mktemp("features")
    write_samples(folder / "data.json", KINDS)
    shutil.copy(folder / "images/data-0-0.png", folder / "images/data-8-0.png")  # a duplicate
    write_samples(folder / "held_out.json", "it")
    for name, changes in STAGES.items():
        changes = dict(changes)
        model = stage_content()["model"] | changes.pop("layers", {})
        write_stage(
            folder / f"{name}.yaml",
            **changes,
            model=model,
            on_bad_sample="skip",
            max_bad_share=1.0,
            schedule={"max_steps": N_STEPS, "epochs": 9},
            logging={"every": 1},
            checkpoint={"every": 4, "keep": 9},
            loader={"workers": 1},
            eval={"every": 5, "data": [{"path": "held_out.json"}], "generate": 1, "max_new_tokens": 3},
        )
    return folder


def command(folder: Path, name: str, output: str, cached: bool = True) -> list[Any]:
    settings = [f"output={output}", f"loader.cache_features={json.dumps(cached)}"]
    return ["--config", folder / f"{name}.yaml", "--set", *settings]


def trained(folder: Path, n_ranks: int) -> dict[str, list[Outcome]]:
    commands = {}
    for name in STAGES:
        for output in ("with", "without"):
            commands[f"{output}/{name}"] = command(folder, name, f"{output}-{n_ranks}", output == "with")
    found = run_many(commands, folder, n_ranks)
    for outcomes in found.values():
        assert not any(outcome.code for outcome in outcomes), outcomes[0].stdout + outcomes[0].stderr
    return found


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, dict[str, list[Outcome]]]:
    return {n_ranks: trained(folder, n_ranks) for n_ranks in (1, 2)}


Runs = dict[int, dict[str, list[Outcome]]]


def decided(run: Path) -> list[dict[str, Any]]:
    """What the lines of metrics.jsonl say but for times."""
    kept = ("step", "loss", "grad_norm", "n_supervised", "n_bad", "eval_loss", "eval_n_bad")
    return [{key: line[key] for key in kept if key in line} for line in read_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_losses_and_result_are_the_same_bit_for_bit(name: str, n_ranks: int, folder: Path, runs: Runs) -> None:
    cached, plain = (folder / f"{output}-{n_ranks}" / name for output in ("with", "without"))
    lines = decided(plain)
    assert len([line for line in lines if "loss" in line]) == N_STEPS
    assert len({line["loss"] for line in lines if "loss" in line}) == N_STEPS
    assert decided(cached) == lines
    assert read_lines(cached / "answers.jsonl") == read_lines(plain / "answers.jsonl")
    for path in plain.glob("model/*.safetensors"):
        expected, found = load_file(path), load_file(cached / "model" / path.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_a_bad_picture_is_bad_in_the_same_way(name: str, n_ranks: int, folder: Path, runs: Runs) -> None:
    cached, plain = (
        sorted(
            read_lines(folder / f"{output}-{n_ranks}" / name / "quarantine.jsonl"),
            key=lambda line: (line["step"], line["index"]),
        )
        for output in ("with", "without")
    )
    assert {(line["index"], line["kind"]) for line in plain} == {(2, "image_missing"), (6, "not_an_image")}
    assert cached == plain


def features_of(output: Path) -> list[Path]:
    return sorted((output / ".cache" / precompute.FOLDER).glob("*/*.safetensors"))


def test_what_it_will_do_is_said_before_and_every_picture_is_kept_once(folder: Path, runs: Runs) -> None:
    """9 good pictures, two of them the same, and one that can be read but not decoded."""
    said = runs[1]["with/stage1-fp32"][0].stdout
    assert "loader.cache_features: encoding 9 of 9 pictures, 0.5 KB each, 0.00 GB in with-1/.cache/features/" in said
    assert said.index("encoding 9 of 9") < said.index("round 1 of 1 done") < said.index("step  1/")
    folders = {path.parent for path in features_of(folder / "with-1")}
    assert len(folders) == 3, "fp32 and bf16 of one layer, fp32 of two"
    for shards in folders:
        pictures = torch.cat([load_file(path)["pictures"] for path in shards.glob("*.safetensors")])
        assert len(pictures) == len(pictures.unique(dim=0)) == 8


def test_a_second_run_computes_nothing_again(folder: Path, runs: Runs) -> None:
    shutil.copytree(folder / "with-1/.cache/features", folder / "second/.cache/features")
    before = {path: path.stat().st_mtime_ns for path in features_of(folder / "second")}
    outcome = run_many({"second": command(folder, "lora-bf16", "second")}, folder)["second"][0]
    assert outcome.code == 0, outcome.stderr
    assert "encoding 1 of 9 pictures" in outcome.stdout, "the one that cannot be decoded"
    assert {path: path.stat().st_mtime_ns for path in features_of(folder / "second")} == before
    assert decided(folder / "second/lora-bf16") == decided(folder / "without-1/lora-bf16")


@pytest.mark.parametrize("keeps_features", [True, False])
def test_a_resumed_run_goes_on_bit_for_bit(keeps_features: bool, folder: Path, runs: Runs) -> None:
    output = f"resumed-{keeps_features}"
    ignored = ["model", "adapter", "step-00000008", "step-00000010"] + ([] if keeps_features else ["features"])
    shutil.copytree(folder / "with-1", folder / output, ignore=shutil.ignore_patterns(*ignored))
    outcome = run_many({"resumed": command(folder, "lora-fp32", output)}, folder)["resumed"][0]
    assert outcome.code == 0, outcome.stderr
    assert "resuming after step 4" in outcome.stdout
    assert decided(folder / output / "lora-fp32") == decided(folder / "without-1/lora-fp32")


def test_a_run_asked_to_stop_before_its_first_step_ends_with_85_and_goes_on(folder: Path, runs: Runs) -> None:
    stop = folder / "stopped/stage1-fp32/stop"
    stop.parent.mkdir(parents=True)
    stop.touch()
    arguments = command(folder, "stage1-fp32", "stopped")
    found = run_many({"first": arguments, "second": arguments}, folder, n_ranks=2)
    assert [outcome.code for outcome in found["first"]] == [85, 85], found["first"][0].stderr
    assert "while features were computed" in found["first"][0].stdout + found["first"][0].stderr
    assert not stop.exists()
    assert [outcome.code for outcome in found["second"]] == [0, 0], found["second"][0].stderr
    assert decided(folder / "stopped/stage1-fp32") == decided(folder / "without-2/stage1-fp32")


def test_a_damaged_shard_stops_the_run_with_the_mend_and_one_cut_off_is_computed_again(
    folder: Path, runs: Runs
) -> None:
    shutil.copytree(folder / "with-1/.cache/features", folder / "damaged/.cache/features")
    for path in features_of(folder / "damaged"):
        content = bytearray(path.read_bytes())
        content[400] ^= 1  # the description of the tensors takes 200
        path.write_bytes(content)
    name = "stage1-fp32"
    damaged, cut = (command(folder, name, "damaged") for _ in range(2))
    first = run_many({"first": damaged}, folder)["first"][0]
    [line] = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert first.code == 2
    assert "is damaged: features have another checksum" in line
    assert "delete the file, the same command computes again what it held and goes on" in line
    for path in features_of(folder / "damaged"):
        path.write_bytes(path.read_bytes()[:-10])
    second = run_many({"second": cut}, folder)["second"][0]
    assert second.code == 0, second.stderr
    assert "is cut off or damaged; computing again what it held" in second.stdout
    assert decided(folder / "damaged" / name) == decided(folder / "without-1" / name)


@dataclass
class Small:
    llava: Llava
    dataset: StepDataset
    config: StageConfig

    def fill(self, session: Session | None = None, steps: range = range(4)) -> FeatureCache:
        session = session or Session(World(0, 1, torch.device("cpu")))
        return cached_features(self.config, session, self.llava, self.dataset, steps)

    def shards(self) -> list[Path]:
        return features_of(Path(self.config.output))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A data set of 8 pictures, encoded one at a time into shards of 2."""
    monkeypatch.setattr(precompute, "_MOST_A_SHARD", 2)
    monkeypatch.setattr(precompute, "_TOGETHER", 1)
    monkeypatch.setattr(precompute, "_LOCK_LOOK_S", 0.05)
    llava = tiny_llava()
    data = write_data(tmp_path)
    config = stage(data, output=str(tmp_path / "runs"), loader={"workers": 0, "cache_features": True})
    return Small(llava, dataset_of(llava, data), config)


def test_features_are_what_the_encoder_makes_of_each_picture(small: Small) -> None:
    cache = small.fill()
    assert (len(cache), len(small.shards())) == (8, 4)
    for sample in (small.dataset.mixture[i] for i in range(12)):
        for picture in sample.images:
            pixels = small.dataset.preprocessor(decode_image(picture))[None]
            with torch.no_grad():
                assert torch.equal(cache.of_picture(picture), encode(small.llava.model, pixels)[0])


def test_only_what_the_steps_need_is_computed(small: Small) -> None:
    needed = {i for i in small.dataset._indices(1) if small.dataset.mixture[i].images}
    assert 0 < len(needed) < 8
    assert len(small.fill(steps=range(1, 2))) == len(needed)
    assert len(small.fill(steps=range(0))) == len(needed), "what is there stays"


def test_a_full_disk_is_told_and_the_same_command_goes_on(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], precompute.write_shard

    def full(folder: Path, keys: list[bytes], features: torch.Tensor) -> str:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        written.append(keys)
        return write(folder, keys, features)

    monkeypatch.setattr(precompute, "write_shard", full)
    with pytest.raises(FeatureError, match=r"rank 0: .*No space left on device; mend that, and the same command"):
        small.fill()
    kept = small.shards()
    assert len(kept) == 2
    monkeypatch.setattr(precompute, "write_shard", write)
    assert len(small.fill()) == 8
    assert len(small.shards()) == 4 and set(kept) < set(small.shards())


def test_without_room_nothing_is_begun(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(
        FeatureError, match=r"8 pictures take 0\.06 GB, and .* has 0\.01 GB left; make room, set output"
    ):
        small.fill()
    assert not small.shards()


def test_asked_to_stop_it_keeps_what_it_has_and_goes_on_there(small: Small, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    stop.touch()
    session = Session(World(0, 1, torch.device("cpu")), StopRequests([stop]))
    with pytest.raises(Preempted, match="asked to stop by .*stop while features were computed"):
        small.fill(session)
    assert not stop.exists()
    [kept] = small.shards()
    before = kept.stat().st_mtime_ns
    assert len(small.fill()) == 8
    pictures = torch.cat([load_file(path)["pictures"] for path in small.shards()])
    assert len(pictures) == 8 and kept.stat().st_mtime_ns == before


def test_a_run_waits_for_another_that_computes(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small.fill(steps=range(0)).folder
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / "lock"):
            waiting = pool.submit(small.fill)
            said = ""
            while "another run writes to" not in said:
                said += capsys.readouterr().out
                time.sleep(0.01)
            assert not small.shards()
        assert len(waiting.result()) == 8


def test_one_that_waits_can_be_stopped(small: Small, tmp_path: Path) -> None:
    folder = small.fill(steps=range(0)).folder
    (tmp_path / "stop").touch()
    session = Session(World(0, 1, torch.device("cpu")), StopRequests([tmp_path / "stop"]))
    with FileLock(folder / "lock"), pytest.raises(Preempted):
        small.fill(session)


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9))
def test_rounds_give_every_picture_to_one_rank_in_shards_that_are_not_too_large(
    n_pictures: int, n_ranks: int, most: int
) -> None:
    found = precompute._Found(np.arange(n_pictures), np.zeros((n_pictures, 2)))
    with mock.patch.object(precompute, "_MOST_A_SHARD", most):
        of_ranks = [list(precompute._rounds(found, 100, rank, n_ranks)) for rank in range(n_ranks)]
    assert len({len(rounds) for rounds in of_ranks}) == 1
    shards = [np.concatenate([b.keys for b in batches] or [[]]) for rounds in of_ranks for batches in rounds]
    assert all(len(shard) <= most for shard in shards)
    assert sorted(np.concatenate([*shards, []]).tolist()) == list(range(n_pictures))
