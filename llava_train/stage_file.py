"""Reads stage files, and says what is wrong with one.

A stage file is YAML and describes one stage on its own. `load_stage` reads it, applies `--set` overrides
and returns a `StageConfig`, or raises `ConfigError` with the file, the key, what is allowed and the nearest
valid name. No other module reads YAML.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from llava_train.config import StageConfig
from llava_train.errors import UserError

RUN_CARD = "config.yaml"
"""The stage file that a run leaves in its folder, with every default written out."""


class ConfigError(UserError):
    """A stage file says something that cannot be run. The message names the file, the key and the mend."""


def load_stage(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """Reads a stage file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` strings; the value is YAML, an integer in the key indexes a list.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or contradiction.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the stage file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a stage file is a mapping of keys, such as `name: my-stage`")
    for override in overrides:
        _apply_override(content, override)
    return parse_stage(content, str(path))


def load_run_card(run_dir: Path) -> StageConfig:
    """The stage file that a run was trained with, as it left it in its folder. Raises ConfigError."""
    stage = {key: value for key, value in _run_card(run_dir).items() if key != "about"}
    return parse_stage(stage, str(run_dir / RUN_CARD))


def load_run_about(run_dir: Path) -> dict[str, Any]:
    """What a run noted beside its stage file: versions, number of ranks, its data. Raises ConfigError."""
    return dict(_run_card(run_dir).get("about") or {})


def _run_card(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RUN_CARD
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read what the run was trained with: {error}") from error


def parse_stage(content: dict[str, Any], origin: str) -> StageConfig:
    """Validates the content of a stage file. `origin` names it in errors. Raises ConfigError."""
    try:
        return StageConfig.model_validate(content)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem).splitlines()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in dict.fromkeys(lines))) from None


def with_suffix(stages: Sequence[StageConfig], suffix: str) -> list[StageConfig]:
    """The stages as runs of their own, `NAME-suffix`; an `init_from` that names one of them follows.

    Raises:
        ConfigError: no folder can be called so.
    """
    renamed = {stage.run_dir.resolve(): stage.run_dir.with_name(f"{stage.name}-{suffix}") for stage in stages}
    found = []
    for stage in stages:
        content = stage.model_dump(mode="json")
        content["name"] = renamed[stage.run_dir.resolve()].name
        if stage.init_from is not None and Path(stage.init_from).resolve() in renamed:
            content["init_from"] = str(renamed[Path(stage.init_from).resolve()])
        found.append(parse_stage(content, f"--suffix {suffix}"))
    return found


def with_overrides(config: StageConfig, overrides: Sequence[str]) -> StageConfig:
    """A stage with some keys changed, as `--set` changes them. Raises ConfigError."""
    content = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(content, override)
    return parse_stage(content, "--set " + " ".join(overrides))


def stage_schema() -> dict[str, Any]:
    """JSON Schema of a stage file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **StageConfig.model_json_schema()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML 1.1 lets a later key replace an earlier one in silence. Not here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a name, not a list or mapping{key_node.start_mark}")
            if key_node.value in seen:
                raise yaml.YAMLError(f"key {key_node.value!r} stands twice{key_node.start_mark}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value` in place; sections that the file leaves out are made."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set batch.size=64")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = content
    for name in parents:
        if isinstance(node, list):
            node = node[_list_index(node, name, override)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {name} holds {node!r}, which has no keys")
    if isinstance(node, list):
        node[_list_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _list_index(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise ConfigError(f"--set {override}: {name} is not an index of a list of {len(items)}")
    return int(name)


def _explain(problem: Any) -> str:
    """One validation problem in the words of a user: `key: what is wrong; allowed: ...; did you mean ...?`."""
    location = [step for step in problem["loc"] if not _is_union_tag(step)]
    key = ".".join(map(str, location))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = sorted(_keys_at(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        if location[-1] == "lora":
            hint = "LoRA goes below trainable.language_model, beside its lr; "
        return f"{key}: unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: required, but missing"
    if kind == "value_error":
        message = str(context.get("error", problem["msg"]))
        return f"{key}: {message}" if key else message
    if kind == "literal_error":
        near = difflib.get_close_matches(str(problem["input"]), _plain(context["expected"]), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: {problem['input']!r} is not allowed; allowed: {context['expected']}{hint}"
    message = problem["msg"].partition(" or instance of")[0]
    return f"{key}: {message}, not {problem['input']!r}"


def _plain(expected: str) -> list[str]:
    return [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]


def _is_union_tag(step: Any) -> bool:
    """pydantic adds the name of the tried alternative to a location; users don't write that."""
    alternatives = ("str", "int", "RandomLanguageModel", "RandomVisionTower")
    return step in alternatives or str(step).startswith(("dict[", "list["))


def _keys_at(location: list[Any]) -> set[str]:
    """Names of the keys that are allowed below a location, over all alternatives of its type."""
    models: list[type[BaseModel]] = [StageConfig]
    for step in location:
        if isinstance(step, int):
            continue
        fields = [model.model_fields[step].annotation for model in models if step in model.model_fields]
        models = [model for annotation in fields for model in _models_in(annotation)]
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
