"""The estimate of memory against what PyTorch's allocator saw in steps of real engines, and what is decided by it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_train.config import EngineSection, StageConfig
from llava_train.model.build import build_llava
from llava_train.model.processor import build_processor
from llava_train.model.recompute import RECOMPUTES
from llava_train.model.skeleton import config_without_weights, skeleton
from llava_train.model.trainable import set_trainable
from llava_train.onednn import MOST_KERNELS, kernels_bytes
from llava_train.stage_file import ConfigError, with_overrides
from llava_train.train.holdings import ModelSize, PartSize, held_bytes, size_of
from llava_train.train.memory import GIB, Estimate, Estimator, gib
from llava_train.train.out_of_memory import advice
from llava_train.train.remedies import candidates, find_remedy, turned
from llava_train.train.world import World
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER, model_section, stage
from tests.train.helpers import run_ranks

PARTS = Path(__file__).parents[2] / "parts"
LORA = {"rank": 8, "alpha": 16, "dropout": 0.1}
TRAINABLE: dict[str, dict[str, Any]] = {
    "projector": {"projector": {"lr": 1e-3}},
    "full": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3}},
    "lora": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3, "lora": LORA}},
}
WITHIN = 0.15


def tiny(trainable: str, recompute: str, zero: int = 0, precision: str = "fp32", **engine: Any) -> dict[str, Any]:
    """A stage whose activations are about half of its memory."""
    language_model = {**LANGUAGE_MODEL, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 5}
    return {
        "name": "measured",
        "model": {
            "language_model": {"config": language_model},
            "vision_tower": {"config": VISION_TOWER},
            "chat_template": "vicuna_v1",
        },
        "init_from": "random",
        "trainable": TRAINABLE[trainable],
        "data": [{"path": "none.json"}],
        "batch": {"size": 4, "max_tokens": 256, "max_sample_tokens": 100},
        "engine": {"zero": zero, "precision": precision, "activation_checkpointing": recompute, **engine},
    }


def small(trainable: str, recompute: str) -> dict[str, Any]:
    """SmolLM2-135M and DINOv2-small."""
    model = {
        "language_model": str(PARTS / "smollm2-135m-instruct"),
        "vision_tower": str(PARTS / "dinov2-small"),
        "chat_template": "chatml",
    }
    batch = {"size": 2, "max_tokens": 256, "max_sample_tokens": 160}
    return {**tiny(trainable, recompute), "model": model, "batch": batch, "image": {"size": 56}}


def wide(trainable: str, precision: str) -> dict[str, Any]:
    """Matrices so large that ZeRO 3 divides them."""
    content = tiny(trainable, "selective", 3, precision)
    content["model"]["language_model"]["config"] |= {"hidden_size": 512, "intermediate_size": 1024}
    return content


TINY = {
    **{f"{trainable} {way}": tiny(trainable, way) for trainable in TRAINABLE for way in RECOMPUTES},
    **{
        f"zero{zero} {precision}": tiny("full", "none", zero, precision)
        for zero in (1, 2)
        for precision in ("fp32", "bf16")
    },
    "zero0 bf16": tiny("lora", "selective", 0, "bf16"),
    "zero2 offload": tiny("full", "full", 2, "bf16", offload_optimizer=True),
}
SMALL = {"lora selective": ("lora", "selective"), "full full": ("full", "full")}
ZERO3 = {f"{trainable} {kind}": wide(trainable, kind) for trainable in ("full", "lora") for kind in ("fp32", "bf16")}


def measured(folder: Path, stages: dict[str, dict[str, Any]], n_ranks: int) -> dict[str, dict[str, Any]]:
    """What steps of these stages took on rank 0, and what was estimated."""
    paths = [folder / f"{number}.yaml" for number in range(len(stages))]
    for path, content in zip(paths, stages.values(), strict=True):
        path.write_text(yaml.safe_dump(content))
    out = folder / "measured.json"
    run_ranks(["-m", "tests.train.memory_worker", out, *paths], folder, n_ranks).check()
    return dict(zip(stages, json.loads(out.read_text()).values(), strict=True))


@pytest.fixture(scope="module")
def of_tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measured(tmp_path_factory.mktemp("tiny"), TINY, n_ranks=2)


@pytest.mark.parametrize("name", TINY)
def test_the_estimate_is_the_measured_peak_of_a_tiny_model(name: str, of_tiny: dict[str, dict[str, Any]]) -> None:
    assert of_tiny[name]["estimated"] == pytest.approx(of_tiny[name]["measured"], rel=WITHIN)


@pytest.mark.parametrize("name", ZERO3)
def test_the_estimate_is_the_measured_peak_under_zero_3(name: str, tmp_path: Path) -> None:
    (found,) = measured(tmp_path, {name: ZERO3[name]}, n_ranks=2).values()  # of its own: an engine leaves buffers
    assert found["estimated"] == pytest.approx(found["measured"], rel=WITHIN)


@pytest.mark.skipif(not PARTS.is_dir(), reason="needs the small parts: bash scripts/quickstart.sh makes them")
@pytest.mark.parametrize("name", SMALL)
def test_the_estimate_is_the_measured_peak_of_the_small_model(name: str, tmp_path: Path) -> None:
    (found,) = measured(tmp_path, {name: small(*SMALL[name])}, n_ranks=1).values()
    assert found["estimated"] == pytest.approx(found["measured"], rel=WITHIN)


def test_each_way_of_checkpointing_takes_less_than_the_one_before(of_tiny: dict[str, dict[str, Any]]) -> None:
    for trainable in TRAINABLE:
        none, selective, full = (of_tiny[f"{trainable} {way}"]["measured"] for way in RECOMPUTES)
        assert none > selective > full


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", RECOMPUTES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_estimate_is_the_measured_peak_on_a_gpu(trainable: str, way: str, tmp_path: Path) -> None:
    content = tiny(trainable, way, 2, "bf16")
    language_model = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    content["model"]["language_model"]["config"] |= {**language_model, "num_key_value_heads": 8, "vocab_size": 32000}
    content["batch"] = {"size": 8, "max_tokens": 8192, "max_sample_tokens": 2048}
    (found,) = measured(tmp_path, {way: content}, n_ranks=1).values()
    assert found["estimated"] == pytest.approx(found["measured"], rel=WITHIN)


def estimator_of(n_ranks: int = 1, device_type: str = "cuda") -> Estimator:
    section = model_section()
    front = build_processor(section, stage(Path("x")).image)
    return Estimator(config_without_weights(section, front), n_ranks, device_type)


def test_auto_takes_the_first_way_that_fits() -> None:
    estimator, config = estimator_of(), stage(Path("x"))
    totals = [estimator.estimate(config, way).total_bytes for way in RECOMPUTES]
    assert totals == sorted(totals, reverse=True)
    for way, total in zip(RECOMPUTES, totals, strict=True):
        choice = estimator.choose(config, total)
        assert choice.recompute == way
        assert choice.estimate is not None and choice.estimate.total_bytes == total
        assert choice.line.startswith(f"about {gib(total)} of {gib(total)}; activation_checkpointing {way} (auto)")
    assert "more than the" in estimator.choose(config, 1).line


def test_auto_and_the_advice_pass_selective_over_where_it_takes_more_than_none() -> None:
    plain_lora = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3, "lora": {"rank": 8, "alpha": 16}}}
    estimator, config = Estimator(llava_7b(), 1, "cuda"), stage(Path("x"), trainable=plain_lora)
    none, selective, full = (estimator.estimate(config, way).total_bytes for way in RECOMPUTES)
    assert selective > none > full
    assert {estimator.choose(config, budget).recompute for budget in (none, selective)} == {"none"}
    assert {estimator.choose(config, budget).recompute for budget in (full, none - 1)} == {"full"}
    remedy = find_remedy(estimator, config, "none", none - 1)
    assert remedy is not None and "engine.activation_checkpointing=selective" not in remedy.changes


def test_what_the_stage_file_says_is_not_questioned() -> None:
    for way in RECOMPUTES:
        config = stage(Path("x"), engine={"zero": 0, "activation_checkpointing": way})
        choice = estimator_of().choose(config, 1)
        assert choice.recompute == way
        assert "more than the" in choice.line and "auto" not in choice.line


def test_a_model_that_cannot_run_without_values_is_computed_again_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_for_values(self: Any, **pack: Any) -> None:
        pack["input_ids"].sum().item()

    monkeypatch.setattr("llava_train.model.loss.PackedLoss.forward", asks_for_values)
    choice = estimator_of().choose(stage(Path("x")), 10**12)
    assert choice.recompute == "full" and choice.estimate is None
    assert "a llama cannot be run without values" in choice.line


@pytest.mark.parametrize("error", [AssertionError, AttributeError, NotImplementedError, KeyError])
def test_whatever_a_model_raises_without_values_auto_lets_the_run_go_on(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Any, **pack: Any) -> None:
        raise error("no values")

    monkeypatch.setattr("llava_train.model.loss.PackedLoss.forward", refuses)
    choice = estimator_of().choose(stage(Path("x")), 10**12)
    assert choice.recompute == "full" and error.__name__ in choice.line
    ran_out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    told = advice(ran_out, World(0, 1, torch.device("cpu")), choice)
    assert "CUDA out of memory" in told and "change: a lower batch.max_tokens" in told


def test_the_kinds_add_up_to_the_total() -> None:
    for zero in range(4):
        told = estimator_of(n_ranks=2).estimate(stage(Path("x"), engine={"zero": zero}), "none")
        assert sum(told.by_kind().values()) == told.total_bytes == told.as_record()["total_bytes"]


def test_in_float32_attention_keeps_no_scores_on_cuda() -> None:
    engine = {"zero": 2, "precision": "fp32"}

    def activations(device_type: str, n_documents: int) -> int:
        batch = {"size": n_documents, "max_tokens": 1024, "max_sample_tokens": 1024 // n_documents}
        return estimator_of(1, device_type).estimate(stage(Path("x"), batch=batch, engine=engine), "none").activations

    n_heads, n_layers = LANGUAGE_MODEL["num_attention_heads"], LANGUAGE_MODEL["num_hidden_layers"]
    scores = n_layers * n_heads * 1024**2 // 2 * 4
    assert activations("cpu", 1) > activations("cuda", 1) + scores
    assert activations("cuda", 1) == pytest.approx(activations("cuda", 64), rel=0.1)


def test_a_skeleton_has_the_parameters_of_the_real_model() -> None:
    for trainable in TRAINABLE.values():
        config = stage(Path("x"), trainable=trainable)
        real = build_llava(config.model, config.image, torch.float32)
        set_trainable(real.model, config.trainable)
        llava = config_without_weights(config.model, build_processor(config.model, config.image))
        bare = skeleton(llava, config.trainable, torch.float32)
        assert size_of(bare) == size_of(real.model)
        assert all(parameter.is_meta for parameter in bare.parameters())


def test_the_layers_that_are_not_run_are_extrapolated() -> None:
    config = stage(Path("x"))
    totals = []
    for n_layers in (3, 4, 9):
        section = model_section()
        section.language_model.config["num_hidden_layers"] = n_layers
        llava = config_without_weights(section, build_processor(section, config.image))
        totals.append(Estimator(llava, 1, "cpu").estimate(config, "none").activations)
    section.language_model.config["num_hidden_layers"] = 2
    assert totals[2] - totals[1] == 5 * (totals[1] - totals[0]) > 0


sizes = st.integers(10**6, 10**10)


@given(frozen=sizes, trained=sizes, n_ranks=st.sampled_from([2, 8, 64]))
def test_each_zero_stage_divides_more(frozen: int, trained: int, n_ranks: int) -> None:
    size = ModelSize({"language_model": PartSize(frozen, trained)}, n_small=0, largest=10**6)
    held = [held_bytes(size, EngineSection(zero=zero), n_ranks) for zero in (0, 1, 2, 3)]
    assert held[1].optimizer < held[0].optimizer
    assert held[2].gradients < held[1].gradients
    assert sum(held[3].weights.values()) < sum(held[2].weights.values())


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    size = ModelSize({"language_model": PartSize(0, 10**9)}, n_small=0, largest=10**6)
    for zero in (1, 2, 3):
        held = held_bytes(size, EngineSection(zero=zero, offload_optimizer=True), 8)
        assert held.optimizer == 0 and held.on_host > 12 * 10**9 // 8


def test_weights_in_4_bits_take_little_more_than_a_quarter_of_bf16() -> None:
    config = stage(Path("x"), trainable=TRAINABLE["lora"])
    llava = config_without_weights(config.model, build_processor(config.model, config.image))
    model = skeleton(llava, config.trainable, torch.bfloat16)
    plain, quantized = (held_bytes(size_of(model, four), EngineSection(), 1) for four in (False, True))
    n_quantized = size_of(model, True).parts["language_model"].n_quantized
    assert n_quantized > 0
    saved = plain.weights["language_model"] - quantized.weights["language_model"]
    assert saved == pytest.approx(n_quantized * (2 - 0.516), rel=1e-3)
    largest = LANGUAGE_MODEL["hidden_size"] * LANGUAGE_MODEL["intermediate_size"]
    assert quantized.fetching == 2 * largest and plain.fetching == 0


def test_changes_are_tried_from_the_one_that_costs_least() -> None:
    config = stage(Path("x"), engine={"zero": 2, "activation_checkpointing": "none"})
    found = changes_tried(config, n_ranks=8)
    lora = ("trainable.language_model.lora={rank: 128, alpha: 256, dropout: 0.05}", "trainable.language_model.lr=0.01")
    assert found[:7] == [
        ("batch.max_tokens=1024",),
        ("engine.activation_checkpointing=selective",),
        ("engine.activation_checkpointing=full",),
        ("engine.zero=3",),
        ("engine.offload_optimizer=true",),
        ("engine.zero=3", "engine.offload_parameters=true"),
        lora,
    ]
    assert found[-2] == (
        "batch.max_tokens=1024",
        "engine.activation_checkpointing=full",
        "engine.zero=3",
        "engine.offload_optimizer=true",
        "engine.offload_parameters=true",
        *lora,
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_change_to_try_is_allowed(zero: int) -> None:
    config = stage(Path("x"), engine={"zero": zero, "precision": "bf16", "kernels": "compile"})
    for changes in changes_tried(config, n_ranks=2):
        assert with_overrides(config, changes) != config, changes


def test_what_the_users_own_deepspeed_keys_rule_out_keeps_nothing_else_from_being_tried() -> None:
    engine = {"zero": 2, "precision": "bf16", "deepspeed": {"zero_optimization": {"stage": 2}}}
    config = stage(Path("x"), engine=engine)
    *_, last = changes_tried(config, n_ranks=2)
    assert "trainable.language_model.lora.quantize_base=nf4" in last and "engine.zero=3" not in last


def test_under_zero_3_4_bit_weights_are_tried_with_zero_2() -> None:
    lora = {"projector": {"lr": 2e-5}, "language_model": {"lr": 2e-4, "lora": {"rank": 128, "alpha": 256}}}
    config = stage(Path("x"), trainable=lora, engine={"zero": 3, "precision": "bf16"})
    nf4 = "trainable.language_model.lora.quantize_base=nf4"
    alone, together = (changes for changes in changes_tried(config, n_ranks=1) if nf4 in changes)
    assert alone == (nf4, "engine.zero=2")
    assert {"engine.zero=2", "engine.offload_parameters=false"} < set(together)


def test_nothing_can_be_left_out_of_a_remedy() -> None:
    estimator = Estimator(llava_7b(), 2, "cuda")
    batch = {"size": 128, "max_tokens": 8192, "max_sample_tokens": 2048}
    engine = {"zero": 2, "precision": "bf16", "activation_checkpointing": "full"}
    config = stage(Path("x"), batch=batch, engine=engine)
    for budget in (22 * GIB, 11 * GIB):
        remedy = find_remedy(estimator, config, "full", budget)
        assert remedy is not None
        of_lora = [change for change in remedy.changes if change.startswith("trainable")]
        for left_out in set(remedy.changes) - set(of_lora):
            rest = [change for change in remedy.changes if change != left_out]
            with suppress(ConfigError):
                assert estimator.estimate(with_overrides(config, rest), "full").total_bytes > budget
        assert bool(of_lora) == ("adapters train then" in str(remedy))


def changes_tried(config: StageConfig, n_ranks: int) -> list[tuple[str, ...]]:
    return [turned(config, knobs)[0] for knobs in candidates(config, "none", 2048, n_ranks, on_cuda=True)]


def llava_7b() -> LlavaConfig:
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336}
    return LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064),  # its defaults are the 7B's
        vision_config=CLIPVisionConfig(**tower, num_hidden_layers=24, patch_size=14),
        image_token_index=32000,
        image_seq_length=576,
    )


def test_a_remedy_makes_the_stage_fit_and_nothing_before_it_does() -> None:
    estimator, config = (
        estimator_of(n_ranks=2),
        stage(Path("x"), engine={"zero": 2, "activation_checkpointing": "none"}),
    )
    tried = changes_tried(config, n_ranks=2)
    full = estimator.estimate(config, "full").total_bytes
    remedy = find_remedy(estimator, config, "none", full)
    assert remedy is not None and remedy.estimate.total_bytes <= full
    assert remedy.changes in tried[: 1 + tried.index(("engine.activation_checkpointing=full",))]
    assert find_remedy(estimator, config, "none", 1) is None


def test_a_7b_model_is_estimated_without_its_weights() -> None:
    batch = {"size": 128, "max_tokens": 16384, "max_sample_tokens": 2048}
    config = stage(Path("x"), batch=batch, engine={"zero": 3, "precision": "bf16"})
    told = Estimator(llava_7b(), 8, "cuda").estimate(config, "full")
    n_trained = 6.76e9
    assert sum(told.held.weights.values()) == pytest.approx(2 * (n_trained + 0.3e9) / 8, rel=0.02)
    assert told.held.optimizer == pytest.approx(12 * n_trained / 8, rel=0.02)
    assert told.pack.n_tokens == 16384 and told.pack.n_images == 28
    # of each layer its input is kept; a tenth more than one layer's own activations comes on top
    assert 32 * 16384 * 4096 * 2 < told.activations < 2.5 * 32 * 16384 * 4096 * 2


@pytest.mark.parametrize("compiles", [True, False])
def test_on_a_cpu_in_bf16_the_estimate_has_the_compiled_kernels_and_filled_packs(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: compiles)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    batch = {"size": 3, "max_tokens": 4096, "max_sample_tokens": 100}

    def estimate(device_type: str, precision: str) -> Estimate:
        engine = {"zero": 0, "precision": precision}
        return estimator_of(device_type=device_type).estimate(stage(Path("x"), batch=batch, engine=engine), "none")

    on_cpu = estimate("cpu", "bf16")
    assert on_cpu.by_kind().get("compiled kernels", 0) == compiles * kernels_bytes()
    assert on_cpu.pack.n_tokens == (320 if compiles else 300)
    assert sum(on_cpu.by_kind().values()) == on_cpu.total_bytes
    for other in (estimate("cpu", "fp32"), estimate("cuda", "bf16"), estimate("cuda", "fp32")):
        assert "compiled kernels" not in other.by_kind()
        assert other.pack.n_tokens == 300
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    fewer = estimate("cpu", "bf16")
    assert on_cpu.total_bytes - fewer.total_bytes == compiles * (MOST_KERNELS - 64) * kernels_bytes() / 64
