"""benchmarks/gpu.py on a tiny shape: what waits for a GPU must not rot meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_train.train.world import World, start_distributed
from tests.benchmarks.parts_that_die import dies
from tests.scripts import ROOT, load_script
from tests.train.helpers import environment

gpu = load_script("benchmarks/gpu.py")
kernels = load_script("benchmarks/gpu_kernels.py")
parts = load_script("benchmarks/gpu_parts.py")
shapes = load_script("benchmarks/shapes.py")


def test_every_part_that_needs_no_gpu_runs(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--shape", "tiny", "--out", str(out)]
    env = environment(OUT="")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    of_parts = found["parts"]
    assert {name: part["error"] for name, part in of_parts.items() if "error" in part} == {}
    assert len(of_parts) >= 12
    trained = [part for part in of_parts.values() if "tokens_per_s" in part]
    assert len(trained) >= 9 and all(part["tflops"] > 0 and part["loss"] > 0 for part in trained)
    assert of_parts["correctness"]["ok"]
    assert "within bounds" in done.stdout and found["versions"]["torch"]


def test_a_part_that_ends_its_process_or_hangs_loses_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "work", dies)
    record = gpu.Record(tmp_path / "found.json")
    gpu.supervise(gpu.Wanted("cpu", None, None), record, time.monotonic() + 9999)
    assert json.loads((tmp_path / "found.json").read_text())["parts"] == {
        "good": {"found": "good", "before": []},
        "ends": {"error": "its process ended with 9"},
        "hangs": {"error": "took longer than 1 s"},
        "last": {"found": "last", "before": ["ends", "good", "hangs"]},
    }


def test_without_time_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "work", None)
    record = gpu.Record(tmp_path / "found.json", {"device": "d", "date": "2026-01-01"}, {}, ["a", "b"])
    gpu.supervise(gpu.Wanted("cpu", None, None), record, time.monotonic() + 5)
    assert record.parts == dict.fromkeys("ab", {"error": "no time left"})


@pytest.mark.parametrize("fastest", ["eager", "compile", "liger"])
@pytest.mark.parametrize("part", parts.PARTS, ids=lambda part: part.name)
def test_every_part_asks_only_for_what_a_stage_file_may_say(
    part: Any, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that need a GPU too: each stops where it would build its model, for want of memory."""
    asked = []

    def start_rig(config: Any, world: Any) -> None:
        asked.append(config)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(parts, "start_rig", start_rig)
    if part.run in (parts.correctness, parts.attention):
        return  # they build no rig
    bench = parts.Bench(World(0, 1, torch.device("cpu")))
    bench.results["7b lora, x"] = {"kernels": fastest, "tokens_per_s": 1.0}
    with pytest.raises(RuntimeError, match="CUDA out of memory"):  # as torch.OutOfMemoryError is
        part.run(bench)
    assert asked, "a stage file was refused before a model was built"


def test_every_backend_of_attention_on_a_gpu_is_there_and_gives_the_shape_of_the_others() -> None:
    """On `meta`, where kernels for CUDA have shapes alone."""
    lengths = (3, 5)
    borders = torch.tensor([0, 3, 8], dtype=torch.int32, device="meta")
    tensors = [torch.empty(1, 4, 8, 16, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    backends = dict(kernels._backends(cuda=True))
    assert {"by document", "torch varlen"} <= set(backends)
    for attend in backends.values():
        assert attend(*tensors, borders, lengths).shape == (1, 8, 4, 16)


def test_what_does_not_fit_is_freed_before_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[weakref.ref[Any]] = []

    def measure(rig: Any, batches: Any, n_warmup: int) -> dict[str, Any]:
        assert not any(weight() is not None for weight in weights), "the first model is still there"
        weights.append(weakref.ref(rig.llava.model.lm_head.weight))
        rig.step(batches[0])
        if len(weights) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"tokens_per_s": 1.0}

    monkeypatch.setattr(parts, "measure", measure)
    case = parts.Case("tiny", "lora", 4, (("none", 700), ("full", 600)), warmup_samples=2)
    found = parts.train(parts.Bench(start_distributed()), case)
    assert found["activation_checkpointing"] == "full"
    assert found["did_not_fit"] == ["none 700: CUDA out of memory."]


def test_a_profile_that_fails_does_not_lose_what_was_measured() -> None:
    def also(rig: Any) -> dict[str, Any]:
        raise RuntimeError("no profiler here")

    case = parts.Case("tiny", "lora", 4, (("none", 600),), warmup_samples=2)
    found = parts.train(parts.Bench(start_distributed()), case, also)
    assert found["tokens_per_s"] > 0 and found["also_error"] == "RuntimeError: no profiler here"


def test_a_part_after_one_with_liger_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_liger(_: Any) -> dict[str, Any]:
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", parts)
        return {}

    sent: list[tuple[str, Any]] = []
    pipe = type("Pipe", (), {"send": lambda self, message: sent.append(message)})()
    runs = {"a": lambda _: {}, "b": uses_liger, "c": lambda _: {}}
    mine = tuple(parts.Part(name, run, 60) for name, run in runs.items())
    monkeypatch.setattr(sys.modules["gpu_parts"], "PARTS", mine)
    n_threads = torch.get_num_threads()
    gpu.work(pipe, gpu.Wanted("cpu", None, None), ["a", "b", "c"], {})
    torch.set_num_threads(n_threads)
    assert [kind for kind, _ in sent] == ["begins", "done", "begins", "done", "replace"]


def test_the_encoder_is_charged_with_all_layers_that_it_runs() -> None:
    llava = shapes.random_llava(shapes.stage_config("tiny", "full", 4, 600), torch.device("cpu"))
    found = kernels.encoder_speed(llava.model, 1, cuda=False)
    config = llava.model.config.vision_config
    n_tokens, width = 1 + (config.image_size // config.patch_size) ** 2, config.hidden_size
    of_a_layer = 2 * n_tokens * (4 * width**2 + 2 * width * config.intermediate_size)
    assert found["flops_of_an_image"] >= 3 * of_a_layer
    assert found["eager"]["tflops"] == pytest.approx(found["eager"]["images_per_s"] * found["flops_of_an_image"] / 1e12)


def test_covered_counts_what_overlaps_once() -> None:
    assert kernels.covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4


def test_shapes_are_the_published_ones() -> None:
    shape = shapes.SHAPES
    assert (shape["7b"].n_image_tokens, shape["0.5b"].n_image_tokens, shape["0.5b"].n_patches) == (576, 182, 729)
