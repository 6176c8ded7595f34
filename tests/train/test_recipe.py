"""The recipe from its files to its models: stage 1, stage 2 and stage 2 with LoRA, by each launcher.

Invariant 8: `model/` loads in plain transformers and gives what training computed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_train import LLaVA
from llava_train.data.chat import ChatEncoder
from llava_train.data.sources import open_source
from llava_train.files import damage, sha256, write_manifest
from llava_train.model.build import build_llava
from llava_train.model.weights import HandOffError, load_init
from llava_train.stage_file import load_stage
from llava_train.train.assembly import starting_point
from tests.train.helpers import ROOT, TIMEOUT_S, TRAIN, environment, free_port, read_lines, run_ranks, write_stage

BIN = Path(sys.executable).parent
SMOKE = [Path(f"configs/smoke/{name}.yaml") for name in ("stage1", "stage2", "stage2-lora")]
RUNS = ["smoke-stage1", "smoke-stage2", "smoke-stage2-lora"]
N_STEPS = 6
HELD_OUT = [{"path": "configs/smoke/data/held_out.json"}]


@dataclass
class Recipe:
    """Runs of a recipe, and what its commands printed."""

    folder: Path
    printed: str
    printed_again: str
    printed_by_torchrun: str
    errors: dict[str, str]
    """Standard error of the commands of `printed_again` and `printed_by_torchrun`."""
    changed_by_second_run: list[str]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def launch(command: list[Any], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(TORCH_EXTENSIONS_DIR=str(cwd / "compiled"), **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def linear_stages(folder: Path) -> list[Path]:
    """Stage files of LLaVA v1's recipe, a linear projector, and a third stage that trains the projector once more."""
    content = load_stage(ROOT / SMOKE[1]).model.model_dump(mode="json") | {"projector": "linear"}
    common = {"model": content, "batch": {"size": 8, "max_tokens": 2048, "max_sample_tokens": 1024}}
    first = write_stage(
        folder / "linear-stage1.yaml",
        **common,
        trainable={"projector": {"lr": 1e-3}},
        data=[{"path": "configs/smoke/data/captions.json"}],
        engine={"zero": 3, "precision": "fp32"},
        schedule={"max_steps": 3, "warmup": 0.0},
    )
    second = write_stage(
        folder / "linear-stage2.yaml",
        **common,
        init_from="linear-stage1",
        data=[{"path": "configs/smoke/data/conversations.json"}],
        engine={"zero": 2, "precision": "fp32"},
        schedule={"max_steps": 3, "warmup": 0.0},
        eval={"every": 100, "data": HELD_OUT, "generate": 0},
    )
    third = write_stage(
        folder / "linear-stage3.yaml",
        **common,
        init_from="runs/linear-stage2",
        trainable={"projector": {"lr": 1e-2}},
        data=[{"path": "configs/smoke/data/conversations.json"}],
        schedule={"max_steps": 2, "warmup": 0.0},
    )
    return [first, second, third]


def clone(folder: Path) -> None:
    """Makes a folder what the recipe needs of a fresh clone: nothing is drawn or downloaded."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "scripts").symlink_to(ROOT / "scripts")


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): (sha256(path), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    clone(folder)
    deepspeed = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
    printed = launch([*deepspeed, "scripts/train.py", "--config", *SMOKE], folder).stdout
    before = fingerprint(folder / "runs")
    again = launch([sys.executable, TRAIN, "--config", *SMOKE], folder)
    after = fingerprint(folder / "runs")
    torchrun = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    by_torchrun = launch([*torchrun, TRAIN, "--config", *linear_stages(folder)], folder)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    errors = {"python": again.stderr, "torchrun": by_torchrun.stderr}
    return Recipe(folder, printed, again.stdout, by_torchrun.stdout, errors, changed)


@pytest.fixture(scope="module")
def in_plain_transformers(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What a process without llava_train finds in each exported model."""
    config = load_stage(ROOT / SMOKE[1])
    llava, _ = starting_point(config.model_copy(update={"init_from": "random"}))
    encoder = ChatEncoder(llava.tokenizer, llava.processor.chat_template, llava.n_image_tokens, 1024)
    samples = []
    for sample in open_source(recipe.folder / HELD_OUT[0]["path"]):
        tokens = encoder.encode(sample)
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        tensors = {"input_ids": tokens.input_ids.tolist(), "labels": tokens.labels.tolist()}
        samples.append({"messages": messages, "image": str(sample.images[0]), **tensors})
    names = ["smoke-stage2", "smoke-stage2-lora", "linear-stage2"]
    models = {name: str(recipe.run(name) / "model") for name in names}
    (recipe.folder / "spec.json").write_text(json.dumps({"models": models, "samples": samples}))
    script = Path(__file__).with_name("plain_transformers.py")
    launch([sys.executable, script, recipe.folder / "spec.json", recipe.folder / "plain.json"], recipe.folder)
    return json.loads((recipe.folder / "plain.json").read_text())


def test_nothing_is_compiled(recipe: Recipe) -> None:
    """No compiler is needed, and a build that was killed cannot leave a lock that later runs wait for."""
    assert not (recipe.folder / "compiled").exists()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_every_step_and_a_complete_result(recipe: Recipe, name: str) -> None:
    steps = [line["step"] for line in read_lines(recipe.run(name) / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, N_STEPS + 1))
    assert damage(recipe.run(name) / "model") is None
    assert f"{name}: finished, result in runs/{name}/model" in recipe.printed
    assert sorted(path.name for path in (recipe.run(name) / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_recipe_runs_in_one_process_and_elsewhere_by_one_override(recipe: Recipe) -> None:
    run_ranks([TRAIN, "--config", *SMOKE, "--set", "output=alone/runs"], recipe.folder).check()
    for name in RUNS[:2]:  # without dropout, which draws by rank
        alone, by_two = (
            [line["loss"] for line in read_lines(folder / name / "metrics.jsonl") if "loss" in line]
            for folder in (recipe.folder / "alone/runs", recipe.folder / "runs")
        )
        assert alone == pytest.approx(by_two, rel=1e-4) and len(alone) == N_STEPS
    assert damage(recipe.folder / "alone/runs/smoke-stage2-lora/model") is None


def test_the_data_of_the_recipe_are_committed_and_small() -> None:
    files = [path for path in (ROOT / "configs/smoke/data").rglob("*") if path.is_file()]
    assert len(files) == 23 and sum(path.stat().st_size for path in files) < 32_000
    tracked = subprocess.run(["git", "ls-files", "configs/smoke/data"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:  # in a checkout
        assert set(tracked.stdout.split()) == {str(path.relative_to(ROOT)) for path in files}


def test_a_run_prints_what_trains(recipe: Recipe) -> None:
    for words in ("projector 6,272 6,272 float32 0.001", "language_model 115,008 0 float32 frozen", "(LoRA)"):
        assert words in " ".join(recipe.printed.split())


def test_libraries_say_nothing_and_only_the_first_of_two_ranks_speaks(recipe: Recipe) -> None:
    assert recipe.errors == {"python": "", "torchrun": ""}
    said = recipe.printed_by_torchrun.splitlines()
    for name in ("linear-stage1", "linear-stage2", "linear-stage3"):
        assert (
            said.count(f"{name}: run folder runs/{name}")
            == said.count(f"{name}: finished, result in runs/{name}/model")
            == 1
        )
    assert sum(line.startswith("  devices      2 ranks, each on CPU") for line in said) == 3
    assert sum(line.startswith("first step after ") for line in said) == 3
    assert not [line for line in said if line.startswith("[")], "DeepSpeed's log"


def test_a_run_ends_with_what_to_type_next(recipe: Recipe) -> None:
    for printed in (recipe.printed, recipe.printed_again):
        after = printed.partition("\nnext:\n")[2]  # the deepspeed launcher has the last word
        ask, report = after.splitlines()[:2]
        assert ask.startswith("  llava-train ask runs/smoke-stage2-lora ")
        assert report == "  llava-train report runs/smoke-stage2-lora"


def test_the_same_command_passes_over_complete_stages_and_changes_nothing(recipe: Recipe) -> None:
    lines = recipe.printed_again.partition("next:")[0].splitlines()
    assert lines == [f"{name}: complete, see runs/{name}/model" for name in RUNS]
    assert "step" not in recipe.printed_again
    assert recipe.changed_by_second_run == []


def test_torchrun_trains_a_linear_projector(recipe: Recipe) -> None:
    assert "linear-stage2: finished, result in runs/linear-stage2/model" in recipe.printed_by_torchrun
    projector = {
        name.removeprefix("multi_modal_projector."): tensor
        for name, tensor in load_file(recipe.run("linear-stage2") / "model/model.safetensors").items()
        if name.startswith("multi_modal_projector.")
    }
    assert torch.equal(projector["linear_2.weight"], torch.eye(64))
    assert not projector["linear_2.bias"].any()
    at_the_end_of_stage_1 = load_file(recipe.run("linear-stage1") / "model/projector.safetensors")
    assert not torch.equal(projector["linear_1.weight"], at_the_end_of_stage_1["linear_1.weight"])


def test_a_projector_that_trains_in_a_whole_model_leaves_a_whole_model(recipe: Recipe) -> None:
    before, after = (load_file(recipe.run(f"linear-stage{i}") / "model/model.safetensors") for i in (2, 3))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias"}


@pytest.mark.parametrize("name", ["smoke-stage2", "smoke-stage2-lora"])
def test_stage_2_starts_from_the_projector_of_stage_1_and_prints_its_hash(recipe: Recipe, name: str) -> None:
    card = json.loads((recipe.run("smoke-stage1") / "model/projector.json").read_text())
    assert card["sha256"] == sha256(recipe.run("smoke-stage1") / "model/projector.safetensors")
    _, _, of_stage = recipe.printed.partition(f"{name}: run folder ")
    wanted = f"  starts from  projector from runs/smoke-stage1/model, sha256 {card['sha256'][:16]}"
    assert next(line for line in of_stage.splitlines() if "starts from" in line) == wanted


def test_a_projector_with_a_flipped_byte_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(recipe.run("smoke-stage1"), tmp_path / "stage1")
    file = tmp_path / "stage1/model/projector.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    write_manifest(tmp_path / "stage1/model")  # else the manifest would notice first
    config = load_stage(ROOT / SMOKE[1])
    llava = build_llava(config.model, config.image, torch.float32)
    with pytest.raises(HandOffError, match=r"projector\.safetensors has .* the file changed .* run that stage again"):
        load_init(str(tmp_path / "stage1"), llava.model, config.model)


@pytest.mark.parametrize("name", ["smoke-stage2", "smoke-stage2-lora", "linear-stage2"])
def test_the_model_in_plain_transformers_computes_the_loss_of_training(
    recipe: Recipe, in_plain_transformers: dict[str, dict[str, Any]], name: str
) -> None:
    of_training = [line for line in read_lines(recipe.run(name) / "metrics.jsonl") if "eval_loss" in line][-1]
    assert in_plain_transformers[name]["loss"] == pytest.approx(of_training["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["smoke-stage2", "smoke-stage2-lora", "linear-stage2"])
def test_the_model_in_plain_transformers_talks_as_it_was_trained_to(
    recipe: Recipe, in_plain_transformers: dict[str, dict[str, Any]], name: str
) -> None:
    found = in_plain_transformers[name]
    assert found["same_tokens"], "the exported processor makes the tokens that training saw"
    assert found["same_prompts"], "string and list content give the same prompt"
    assert found["n_generated"] == 4
    assert found["n_until_end"] == 3, "generation stops after the end-of-turn token"
    assert found["attention"] == "sdpa"
    assert "packed" not in (recipe.run(name) / "model/config.json").read_text()


def test_the_adapter_gives_the_merged_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recipe.run("smoke-stage2-lora")
    monkeypatch.chdir(recipe.folder)
    base, _ = starting_point(load_stage(ROOT / SMOKE[2]))
    base.model.model.language_model.set_attn_implementation("sdpa")
    projector = load_file(run / "adapter/projector.safetensors")
    base.model.model.multi_modal_projector.load_state_dict(projector)
    adapted = PeftModel.from_pretrained(base.model, str(run / "adapter")).eval()
    merged = LlavaForConditionalGeneration.from_pretrained(run / "model")
    image_tokens = [merged.config.image_token_id] * base.n_image_tokens
    input_ids = torch.tensor([[5, 6, *image_tokens, 7, 8, 9]])
    pixel_values = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        ours, expected = (m(input_ids=input_ids, pixel_values=pixel_values).logits for m in (adapted, merged))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        with adapted.disable_adapter():
            assert not torch.allclose(
                adapted(input_ids=input_ids, pixel_values=pixel_values).logits, expected, atol=1e-4
            )


def test_every_run_can_be_asked_and_an_adapter_answers_as_its_merged_model(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.folder)
    question = (next(recipe.folder.glob("configs/smoke/data/**/*.png")), "What is in the picture?")
    names = ["smoke-stage1", "smoke-stage2", "smoke-stage2-lora", "smoke-stage2-lora/adapter", "linear-stage1"]
    told = {name: LLaVA.from_pretrained(recipe.run(name), "cpu") for name in names}
    answers = {name: llava.generate([question], max_new_tokens=12)[0] for name, llava in told.items()}
    assert answers["smoke-stage2-lora"] == answers["smoke-stage2-lora/adapter"]
    assert len(set(answers.values())) == len(names) - 1
    trained = load_file(recipe.run("smoke-stage1") / "model/projector.safetensors")
    for name, tensor in told["smoke-stage1"].model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, trained[name])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_recipe_on_a_gpu_in_bf16_learns_as_on_a_cpu_in_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision, visible in (("fp32", ""), ("bf16", "0")):
        folder = tmp_path / precision
        folder.mkdir()
        clone(folder)
        train = [sys.executable, TRAIN, "--config", *SMOKE, "--set", f"engine.precision={precision}"]
        launch(train, folder, CUDA_VISIBLE_DEVICES=visible)
        lines = [line for name in RUNS for line in read_lines(folder / "runs" / name / "metrics.jsonl")]
        losses[precision] = [line["loss"] for line in lines if "loss" in line]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=5e-3)
