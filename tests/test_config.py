"""Every refusal is told with the file, the key, what is allowed and the nearest valid name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava_train import config
from llava_train.config import Section
from llava_train.stage_file import ConfigError, load_stage, parse_stage, stage_schema

ROOT = Path(__file__).parents[1]
STAGE_FILES = sorted(ROOT.glob("configs/**/*.yaml"))
GOOD = {
    "name": "good",
    "model": {"language_model": "a/b", "vision_tower": "c/d", "chat_template": "vicuna_v1"},
    "init_from": "runs/stage1",
    "trainable": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-5}},
    "data": [{"path": "data.json"}],
    "batch": {"size": 8, "max_tokens": 4096, "max_sample_tokens": 2048},
}


def refusal(tmp_path: Path, content: dict | str, *overrides: str) -> str:
    """The message with which a stage file is refused."""
    path = tmp_path / "stage.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_stage(path, overrides)
    return str(caught.value).replace(str(path), "stage.yaml")


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_stage_file_of_the_project_loads(path: Path) -> None:
    stage = load_stage(path)
    assert stage.name == f"{path.parent.name}-{path.stem}"


def test_all_recipes_are_there() -> None:
    recipes = {path.parent.name for path in STAGE_FILES}
    assert recipes == {"llava-v1-7b", "llava-1.5-7b", "llava-1.5-13b", "small", "smoke"}


def test_recipes_name_the_runs_that_they_start_from() -> None:
    """So that `--set output=X` holds for all stages of a recipe."""
    starts = {path: load_stage(path).init_from for path in STAGE_FILES if path.stem != "stage1"}
    assert starts == {path: f"{path.parent.name}-stage1" for path in starts} and len(starts) == 10


def test_the_published_recipe_of_llava_15() -> None:
    stage1, stage2, lora = (
        load_stage(ROOT / f"configs/llava-1.5-7b/{n}.yaml") for n in ("stage1", "stage2", "stage2-lora")
    )
    assert (stage1.batch.size, stage1.trainable.learning_rates()) == (256, {"projector": 1e-3})
    assert (stage2.batch.size, stage2.engine.zero, stage2.image.aspect) == (128, 3, "pad")
    assert stage2.trainable.learning_rates() == {"projector": 2e-5, "language_model": 2e-5}
    assert lora.trainable.lora.model_dump() == {"rank": 128, "alpha": 256, "dropout": 0.05, "quantize_base": None}
    assert lora.trainable.learning_rates() == {"projector": 2e-5, "language_model": 2e-4}
    assert stage2.schedule.model_dump() == {
        "epochs": 1, "max_steps": None, "lr": "cosine", "warmup": 0.03, "weight_decay": 0.0, "clip": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("path", [path for path in STAGE_FILES if "lora" in path.stem], ids=str)
def test_a_recipe_of_lora_keeps_the_frozen_weights_on_each_gpu(path: Path) -> None:
    """ZeRO 3 would send them to every GPU in every micro-step."""
    assert load_stage(path).engine.zero == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bacth={}", "stage.yaml: bacth: unknown key; did you mean batch? allowed here: batch, checkpoint, data,"),
        ("batch.sizee=4", "stage.yaml: batch.sizee: unknown key; did you mean size? allowed here: max_sample_tokens"),
        ("data.0.image=x", "stage.yaml: data.0.image: unknown key; did you mean images? allowed here: images, name, path, s"),
        ("trainable.vision={lr: 1}", "trainable.vision: unknown key; did you mean vision_tower?"),
        ("trainable.projector.lora={rank: 4}", "trainable.projector.lora: unknown key; LoRA goes below trainable.lang"),
        ("trainable.vision_tower={lr: 1e-5, lora: {rank: 4}}", "trainable.vision_tower.lora: unknown key; LoRA goes"),
        ("trainable.language_model={lora: {rank: 4, alpha: 8}}", "trainable.language_model.lr: required, but missing"),
        ("trainable.language_model.lr=0", "trainable.language_model.lr: must be above 0, not 0"),
        ("batch.size=many", "batch.size: must be a whole number, not 'many'"),
        ("batch.size=0", "batch.size: must be above 0, not 0"),
        ("model.chat_template=vicuna", "model.chat_template: 'vicuna' is neither a template (plain, vicuna_v1, llava_v0, llama2,"),
        ("model.chat_template=vicuna", "gemma, zephyr, auto) nor a jinja file; did you mean vicuna_v1?"),
        ("model.chat_template=none.jinja", "model.chat_template: 'none.jinja' is neither a template (plain, "),
        ("engine.zero=4", "engine.zero: 4 is not allowed; allowed: 0, 1, 2 or 3"),
        ("engine.precision=fp16", "engine.precision: 'fp16' is not allowed; allowed: 'bf16' or 'fp32'"),
        ("model.vision_tower={config: {}, sede: 1}", "model.vision_tower.sede: unknown key; did you mean seed?"),
        ("name=a/b", "name: 'a/b' is no name; use letters, digits"),
        ("init_from=null", "init_from: missing, but the stage trains more than the projector; name the run of the stage that"),
        ("batch.max_tokens=1024", "batch.max_tokens: 1024 is below batch.max_sample_tokens (2048)"),
        ("trainable={}", "trainable: every part is frozen, nothing would train; list at least one of projector, lang"),
        ("engine={zero: 2, offload_parameters: true}", "engine.offload_parameters: needs engine.zero: 3, not 2"),
        ("engine={zero: 0, offload_optimizer: true}", "engine.offload_optimizer: needs engine.zero: 1, 2 or 3, not 0"),
        ("eval={every: 5, data: []}", "eval.data: must not be empty"),
        ("schedule.warmup=1.5", "schedule.warmup: must be below 1, not 1.5"),
        ("schedule.epochs=.inf", "schedule.epochs: must be a finite number, not .inf"),
        ("seed=-1", "seed: must be at least 0, not -1"),
        ("logging.wandb={projet: x}", "logging.wandb.projet: unknown key; did you mean project? allowed here: entity, mode, pr"),
        ("eval={every: 1, data: [{path: x, imags: y}]}", "eval.data.0.imags: unknown key; did you mean images? allowed"),
        ("trainable.language_model.lora={rank: 4, alpha: 8, drop: 0.1}", "trainable.language_model.lora.drop: unknown key"),
        ("trainable=projector", "trainable: must be a mapping of keys, not 'projector'"),
        ("data=a.json", "data: must be a list, not 'a.json'"),
        ("data=[]", "data: must not be empty"),
        ("batch=null", "batch: must be a mapping of keys, not null"),
        ("engine.deepspeed=3", "engine.deepspeed: must be a text or a mapping of keys, but YAML reads 3 as a number; write it --set 'engine.deepspeed=\"3\"'"),
        ("batch.over_long=skip", "batch.over_long: 'skip' is not allowed; allowed: 'error', 'drop' or 'truncate'"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_refused_with_a_remedy(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{zero: 3}", "4-bit weights cannot be spread over GPUs by engine.zero: 3; set it to 2, or remove the key"),
        ("{zero: 3, offload_parameters: true}", "4-bit weights stay on the GPU; remove engine.offload_parameters"),
        ("{zero: 2, precision: fp32}", "the layers compute in bf16; set engine.precision to it, or remove the key"),
    ],
)
def test_an_engine_that_4_bit_weights_cannot_have_is_refused(engine: str, message: str, tmp_path: Path) -> None:
    lora = "trainable.language_model.lora={rank: 4, alpha: 8, quantize_base: nf4}"
    found = refusal(tmp_path, GOOD, lora, f"engine={engine}")
    assert f"trainable.language_model.lora.quantize_base: {message}" in found


def test_features_of_a_vision_tower_that_trains_cannot_be_cached(tmp_path: Path) -> None:
    overrides = ("trainable.vision_tower={lr: 1.0e-6}", "loader.cache_features=true")
    assert "loader.cache_features: a vision tower that trains has new features" in refusal(tmp_path, GOOD, *overrides)


def test_answers_cannot_be_generated_without_a_prompt(tmp_path: Path) -> None:
    overrides = ("eval={every: 5, data: [{path: x}]}", "model.chat_template=plain")
    assert "model.chat_template: plain has no prompt to answer" in refusal(tmp_path, GOOD, *overrides)


@pytest.mark.parametrize("key", ["name", "model", "trainable", "data", "batch"])
def test_a_key_that_a_stage_needs_is_asked_for(key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, {k: v for k, v in GOOD.items() if k != key}) == f"stage.yaml: {key}: required, but missing"


def test_a_projector_alone_needs_no_earlier_stage() -> None:
    content = {**GOOD, "trainable": {"projector": {"lr": 1e-3}}, "init_from": None}
    assert parse_stage(content, "x").init_from is None


def test_a_frozen_everything_file_is_refused_under_zero_3(tmp_path: Path) -> None:
    assert "nothing would train" in refusal(tmp_path, GOOD, "trainable={}", "engine.zero=3")


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, "batch.size=0", "engine.zero=9", "nome=x")
    assert len(message.splitlines()) == 3
    assert all(line.startswith("stage.yaml: ") for line in message.splitlines())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("{zero_optimization: {stage: 2}}", "its key zero_optimization.stage (2) conflicts with engine.zero of the stage file (3)"),
        ("{optimizer: {type: Lion}}", 'its key optimizer ({"type": "Lion"}) conflicts with trainable.*.lr of the stage file'),
        ("{train_batch_size: 64}", "its key train_batch_size (64) conflicts with batch.size of the stage file (8)"),
        ("{gradient_accumulation_steps: 4}", "its key gradient_accumulation_steps (4) conflicts with batch.max_tokens"),
        ("{bf16: {enabled: false}}", "its key bf16.enabled (false) conflicts with engine.precision of the stage file (true)"),
        ("{gradient_clipping: 0.5}", "its key gradient_clipping (0.5) conflicts with schedule.clip of the stage file (1.0)"),
        ("{train_micro_batch_size_per_gpu: 2}", "its key train_micro_batch_size_per_gpu (2) conflicts with batch.max_tokens"),
        ("{scheduler: {type: WarmupLR}}", 'its key scheduler ({"type": "WarmupLR"}) conflicts with schedule.lr'),
        ("{fp16: {enabled: true}}", "its key fp16.enabled (true) conflicts with engine.precision"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", 'device ("cpu") conflicts with engine.offload_optimizer of the stage file ("none")'),
        ("{zero_optimization: {offload_param: {device: nvme}}}", 'device ("nvme") conflicts with engine.offload_parameters of the stage file ("none")'),
        ("{activation_checkpointing: {cpu_checkpointing: true}}", "its key activation_checkpointing"),
        ("{zero_optimization: {cpu_offload: true}}", "its key zero_optimization.cpu_offload (true) conflicts with engine.offload_optimizer"),
        ("{zero_force_ds_cpu_optimizer: true}", "its key zero_force_ds_cpu_optimizer (true) conflicts with engine.offload_optimizer"),
        ("{data_types: {grad_accum_dtype: bf16}}", 'its key data_types.grad_accum_dtype ("bf16") conflicts with engine.precision'),
        ("{steps_per_print: 10}", "its key steps_per_print (10) conflicts with logging.every"),
        ("{bf16: true}", "its key bf16 must hold keys of its own, not true"),
        ("missing.json", "engine.deepspeed: cannot read missing.json: "),
    ],
)  # fmt: skip
def test_a_deepspeed_json_that_contradicts_the_stage_file_is_refused(keys: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, GOOD, "engine.zero=3", f"engine.deepspeed={keys}")


@pytest.mark.parametrize("text", ["{not json", "[1, 2]"])
def test_a_deepspeed_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    assert "engine.deepspeed: cannot read" in refusal(tmp_path, GOOD, f"engine.deepspeed={tmp_path / 'ds.json'}")


def test_deepspeed_keys_that_agree_or_are_free_are_taken() -> None:
    keys = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "optimizer": "auto",
        "wall_clock_breakdown": True,
    }
    stage = parse_stage({**GOOD, "engine": {"zero": 2, "deepspeed": keys}}, "x")
    assert stage.engine.deepspeed == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b", "stage.yaml: not valid YAML: key 'name' stands twice"),
        ("batch:\n  size: 1\n  size: 2", "stage.yaml: not valid YAML: key 'size' stands twice"),
        ("data:\n- path: a\n  path: b", "stage.yaml: not valid YAML: key 'path' stands twice"),
        ("[a, b]: 1", "stage.yaml: not valid YAML: a key is a name, not a list or mapping"),
        ("1: a", 'stage.yaml: 1: a key must be a text; write it in quotes: "1"'),
        ("name: [a", "stage.yaml: not valid YAML"),
        ("- a", "stage.yaml: a stage file is a mapping of keys"),
        ("", "stage.yaml: a stage file is a mapping of keys"),
    ],
)
def test_a_file_that_is_no_stage_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a".encode("utf-16"), "text in UTF-16, not in UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
        ("name: a".encode("utf-16-le"), "text in UTF-16, not in UTF-8; convert it: iconv -f UTF-16LE"),
        ("name: a".encode("utf-16-be"), "text in UTF-16, not in UTF-8; convert it: iconv -f UTF-16BE"),
        ("name: a".encode("utf-32"), "text in UTF-32, not in UTF-8; convert it: iconv -f UTF-32"),
        ("name: ä".encode("latin-1"), "not text in UTF-8: "),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "this is a PNG picture, not a stage file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "this is a Git LFS pointer"),
    ],
)
def test_a_stage_file_that_is_not_text_in_utf_8_is_called_what_it_is(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "stage.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_stage(path)
    assert f"stage.yaml: {message}" in str(refused.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read the stage file: No such file"):
        load_stage("nowhere.yaml")


def test_overrides_reach_nested_keys_lists_and_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    stage = load_stage(
        path, ["batch.size=64", "data.0.images=pictures", "logging.wandb.project=x", "schedule.clip=null"]
    )
    assert (stage.batch.size, stage.data[0].images) == (64, "pictures")
    assert (stage.logging.wandb.project, stage.schedule.clip) == ("x", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.size", "--set batch.size: write it as key=value"),
        ("data.3.path=x", "--set data.3.path=x: 3 is not an index of a list of 1"),
        ("=3", "--set =3: write it as key=value"),
        ("data.first.path=x", "--set data.first.path=x: first is not an index of a list of 1"),
        ("data.².path=x", "--set data.².path=x: ² is not an index of a list of 1"),
        ("data.-1=x", "--set data.-1=x: -1 is not an index of a list of 1"),
        ("name.first=x", "--set name.first=x: name holds 'good', which has no keys"),
        ("extra.0.path=x", "--set extra.0.path=x: 0 holds 7, which has no keys"),
        ("batch.size=[", "--set batch.size=[: the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, {**GOOD, "extra": [7]}, override)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(GOOD).replace("lr: 1.0e-05", "lr: 1e-5"))
    assert isinstance(yaml.safe_load(path.read_text())["trainable"]["language_model"]["lr"], str)
    rates = load_stage(path, ["trainable.projector.lr=1e-3"]).trainable.learning_rates()
    assert rates == {"projector": 0.001, "language_model": 0.00001}


def test_the_resolved_config_loads_again() -> None:
    stage = load_stage(ROOT / "configs/smoke/stage2-lora.yaml")
    assert parse_stage(stage.model_dump(mode="json"), "x") == stage


def test_the_schema_describes_every_section() -> None:
    schema = stage_schema()
    assert schema["additionalProperties"] is False
    assert {"model", "trainable", "data", "batch", "engine", "eval"} <= schema["properties"].keys()
    assert "max_sample_tokens" in schema["$defs"]["BatchSection"]["properties"]
    assert "memory knob" in schema["$defs"]["BatchSection"]["properties"]["max_tokens"]["description"]


def test_the_schema_names_every_key_of_every_section_and_refuses_others() -> None:
    schema = stage_schema()
    references = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert references == schema["$defs"].keys()
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    sections = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, Section)]
    for section in set(sections) - {Section}:
        described = schema if section is config.StageConfig else schema["$defs"][section.__name__]
        assert described["properties"].keys() == section.model_fields.keys()


def test_the_command_prints_the_schema() -> None:
    command = [sys.executable, "-m", "llava_train", "schema"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == stage_schema()


def test_a_wrong_file_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "bacth": 1}))
    program = "import sys; from llava_train.cli import run; from pathlib import Path; "
    program += f"code = run([Path({str(path)!r})], []); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bacth: unknown key; did you mean batch?" in done.stderr
