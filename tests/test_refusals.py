"""Nothing of pydantic's own words reaches a user, whatever stands in a stage file."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic_core.core_schema import ErrorType

from llava_train import LLaVA
from llava_train.config import ModelSection, StageConfig
from llava_train.refusals import _LIMITS, _TYPES, SectionError, validated
from llava_train.stage_file import ConfigError, _apply_override, load_stage, parse_stage
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER

PYDANTIC = re.compile(
    r"Input should|Value error|String should|List should|Dictionary should|Keys should|valid (string|integer|dictionary)"
    r"|unable to|pydantic|instance of|\[key\]|function-|datetime"
)
GOOD: dict[str, Any] = {
    "name": "good",
    "model": {"language_model": "a/b", "vision_tower": "c/d", "chat_template": "vicuna_v1"},
    "init_from": "stage1",
    "trainable": {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-5, "lora": {"rank": 4, "alpha": 8}}},
    "data": [{"path": "data.json"}],
    "batch": {"size": 8, "max_tokens": 4096, "max_sample_tokens": 2048},
    "eval": {"every": 5, "data": [{"path": "x.json"}], "metric": "exact", "questions": {"path": "q.json"}},
    "logging": {"wandb": {"project": "x"}},
}
ZOO = (
    "3", "-1", "0", "1.5", ".nan", ".inf", "1e400", "9" * 400, "true", "on", "null", "~", "", "2024-01-01", "12:30", "text",
    "''", '"\\ud800"', "[]", "[a]", "[1, [2]]", "{}", "{a: b}", "{1: 2}", "{config: 3}", "{config: {1: 2}}", "!!binary aGk=",
    "{path: {a: 1}}", "{config: {}, seed: x}", "[{path: 3, take: 1000}]", "first 1,000", "x" * 500,
)  # fmt: skip
"""YAML of every type, and of the shapes that some key takes."""


def every_key() -> list[str]:
    """The dotted keys of the schema, sections included."""

    def walk(node: dict[str, Any], key: str) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        for name, inner in node.get("properties", {}).items():
            found.append(f"{key}.{name}" if key else name)
            walk(inner, found[-1])
        for inner in node.get("anyOf", ()):
            walk(inner, key)
        if "items" in node:
            walk(node["items"], f"{key}.0")

    schema, found = StageConfig.model_json_schema(), list[str]()
    walk(schema, "")
    return [key for key in dict.fromkeys(found) if ".take." not in key and "vision_feature_layer.0" not in key]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refusals") / "stage.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_stage(file, overrides)
    return str(caught.value).replace(f"{file}: ", "")


@pytest.mark.parametrize("key", every_key())
def test_any_value_in_any_key_is_taken_or_refused_in_our_words(key: str, file: Path) -> None:
    n_refused, good, good_written = 0, copy.deepcopy(GOOD), yaml.load(file.read_text(), Loader=yaml.BaseLoader)
    for part in ("language_model", "vision_tower"):
        if key.startswith(f"model.{part}."):
            good["model"][part] = good_written["model"][part] = {"config": {}}
    for value in ZOO:
        content, written = copy.deepcopy(good), copy.deepcopy(good_written)
        try:
            _apply_override(content, f"{key}={value}", yaml.SafeLoader)
            _apply_override(written, f"{key}={value}", yaml.BaseLoader)
            parse_stage(content, str(file), written, [key])
        except ConfigError as error:
            n_refused += 1
            assert not PYDANTIC.search(str(error)), error
            assert "cannot be used here" not in str(error), "a kind of problem without words of its own"
            assert max(map(len, str(error).splitlines())) < 600 + len(str(file)), error
    assert n_refused, "no key takes everything"


def test_each_kind_of_problem_is_one_of_pydantic() -> None:
    assert {*_TYPES, *_LIMITS} <= set(get_args(ErrorType))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("001", "001 as a number"),
        ("1_000", "1_000 as a number"),
        ("0x10", "0x10 as a number"),
        ("1.5e+3", "1.5e+3 as a number"),
        ("12:30", "12:30 as a number"),
        ("on", "on as true or false"),
        ("no", "no as true or false"),
        ("2024-01-01", "2024-01-01 as a date"),
    ],
)
def test_a_text_that_yaml_reads_as_something_else_is_shown_as_it_stands_there(
    text: str, written: str, tmp_path: Path
) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(GOOD).replace("name: good", f"name: {text}"))
    assert refusal(path) == f'name: must be a text, but YAML reads {written}; write it in quotes: "{text}"'
    path.write_text(yaml.safe_dump(GOOD).replace("name: good", f'name: "{text}"'))
    if text not in ("12:30", "1.5e+3"):  # no names
        assert load_stage(path).name == text
    path.write_text(yaml.safe_dump(GOOD))
    assert refusal(path, f"data.0.name={text}").endswith(f"""write it --set 'data.0.name="{text}"'""")
    assert load_stage(path, [f'data.0.name="{text}"']).data[0].name == text


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("1000", "first 1000"),
        ("1_000", "first 1000"),
        ("'250'", "first 250"),
        ("first 1,000", "first 1000"),
        ("50%", "a share such as 0.5"),
        ("10%", "a share such as 0.1"),
        ("2.5", "first 1000"),
        ("0", "first 1000"),
        ("-3", "first 1000"),
        ("yes", "first 1000"),
        ("", "all"),
        ("first", "first 1000"),
        ("half", "a share such as 0.5"),
        ("[1]", "repeat 3"),
        ("repeat 2.5", "repeat 3"),
        (".inf", "first 1000"),
    ],
)
def test_how_much_to_take_is_told_in_words_that_work(value: str, meant: str, file: Path) -> None:
    said = refusal(file, f"data.0.take={value}")
    assert said.startswith("data.0.take: ") and "is not understood; write all, first " in said
    assert meant in said
    for word in re.split(r", or |, a share such as |, |; write ", said.partition("; ")[2].removeprefix("write ")):
        load_stage(file, [f"data.0.take={word}"])


@pytest.mark.parametrize("value", ["true", "on", "no"])
def test_a_truth_value_is_no_number(value: str, file: Path) -> None:
    said = refusal(file, f"batch.size={value}", f"checkpoint.every={value}", f"eval.data.0.take={{first: {value}}}")
    assert f"batch.size: must be a number, not {value}" in said
    assert f"checkpoint.every: must be a number, or null for none, not {value}" in said
    assert len(said.splitlines()) == 3
    assert load_stage(file, ["engine.activation_checkpointing=off"]).engine.activation_checkpointing == "none"


def test_a_value_of_several_types_is_told_once(file: Path) -> None:
    assert (
        refusal(file, "model.language_model=[a]")
        == "model.language_model: must be a text or a mapping of keys, not ['a']"
    )
    assert refusal(file, "data.0.images={coco: 3}").startswith("data.0.images.coco: must be a text, but YAML reads 3")
    assert (
        refusal(file, "model.vision_tower={config: 3}") == "model.vision_tower.config: must be a mapping of keys, not 3"
    )
    assert refusal(file, "data.0.images={}") == "data.0.images: must not be empty"


def test_sections_made_in_python_are_refused_in_the_same_words() -> None:
    with pytest.raises(SectionError, match=r"^vision_feature_select: 'x' is not allowed; allowed: 'patch' or 'full'$"):
        validated(ModelSection, language_model="a", vision_tower="b", chat_template="plain", vision_feature_select="x")
    parts: Any = ("vision", "language")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SectionError, match=r"^chat_template: 'vicuna' is neither"),
    ):
        patch.setattr("llava_train.use.llava.load_vision_config", lambda name: (StubConfig, {}))
        LLaVA(*parts, device="cpu", chat_template="vicuna")


class StubConfig:
    model_type = "clip_vision_model"


def test_what_is_good_stays_good() -> None:
    content = {
        **GOOD,
        "model": {
            "language_model": {"config": LANGUAGE_MODEL},
            "vision_tower": {"config": VISION_TOWER},
            "chat_template": "auto",
        },
    }
    assert parse_stage(content, "x").name == "good"
