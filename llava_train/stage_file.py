"""Reads stage files, and says what is wrong with one.

A stage file is YAML and describes one stage on its own. `load_stage` reads it, applies `--set` overrides
and returns a `StageConfig`, or raises `ConfigError` with the file, the key, what is allowed and the nearest
valid name. No other module reads YAML.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llava_train.config import StageConfig
from llava_train.errors import UserError
from llava_train.file_kinds import N_LOOKED_AT, in_utf_8, kind_of_content
from llava_train.places import find_again
from llava_train.refusals import explain, truth_values
from llava_train.user_paths import expand

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
    path = expand(str(path))
    try:
        text = _text_of(path)
        content = yaml.load(text, Loader=_UniqueKeyLoader)
        written = yaml.load(text, Loader=yaml.BaseLoader)  # the same, every scalar as it stands there
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the stage file: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except ValueError as error:  # PyYAML's, of a date or number that cannot be
        raise ConfigError(f"{path}: not valid YAML: {error}; write a text in quotes") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a stage file is a mapping of keys, such as `name: my-stage`")
    for override in overrides:
        _apply_override(content, override, yaml.SafeLoader)
        _apply_override(written, override, yaml.BaseLoader)
    return parse_stage(content, path, written, [override.partition("=")[0] for override in overrides])


def _text_of(path: str) -> str:
    """Read a stage file. Raises ConfigError: it is another file, or in another encoding than UTF-8; OSError."""
    content = Path(path).read_bytes()
    encoding = json.detect_encoding(content)  # by the byte order mark, or where zeros stand
    if not encoding.startswith("utf-8") and "name" in content.decode(encoding, "replace"):
        raise ConfigError(f"{path}: {in_utf_8(encoding)}")
    kind = kind_of_content(content[:N_LOOKED_AT], Path(path))
    if kind is not None and (kind.is_picture or kind.words.startswith("a Git LFS")):
        raise ConfigError(f"{path}: this is {kind.words}, not a stage file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8: {error.reason} at byte {error.start}") from error


def load_run_card(run_dir: Path, needed: Sequence[str] = ()) -> StageConfig:
    """Reads the stage file that a run left in its folder; what it names, and `output`, are where they are now.

    Args:
        needed: keys whose files must be there, with all keys below them.

    Raises:
        ConfigError: no stage file, or the file of a needed key is nowhere.
    """
    card = _run_card(run_dir)
    stage = {key: value for key, value in card.items() if key != "about"}
    missing = find_again(stage, card.get("about") or {}, run_dir)
    for key, (text, tried) in missing.items():
        if any(key == name or key.startswith(f"{name}.") for name in (*needed, "model.chat_template")):
            raise ConfigError(
                f"{run_dir} was trained with {key}: {text}, which is not there any more; looked for:\n  "
                + "\n  ".join(tried)
                + "\nBring it back to one of these places, or use an export of the run (`llava-train export`)"
            )
    if "engine.deepspeed" in missing:
        stage["engine"]["deepspeed"] = None  # of the training; using the run needs none
    stage["output"] = str(run_dir.absolute().parent)
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


def parse_stage(
    content: dict[str, Any], origin: str, written: Any = None, overridden: Sequence[str] = ()
) -> StageConfig:
    """Validates the content of a stage file.

    Args:
        origin: names it in errors.
        written: as `refusals.explain` takes it.
        overridden: as `refusals.explain` takes it.

    Raises:
        ConfigError: unknown keys, wrong types and contradictions, a line each.
    """
    flags = dict(truth_values(content, StageConfig, written))
    lines = [f"{key}: {problem}" for key, problem in flags.items()]
    config = None
    try:
        config = StageConfig.model_validate(content)
    except ValidationError as error:
        found = explain(error, StageConfig, written, overridden)
        lines += [line for line in found if line.partition(": ")[0] not in flags]
    if lines or config is None:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines))
    return config


def with_suffix(stages: Sequence[StageConfig], suffix: str) -> list[StageConfig]:
    """The stages as runs of their own, `NAME-suffix`; an `init_from` that names one of them follows.

    Raises:
        ConfigError: no folder can be called so.
    """
    renamed = {stage.run_dir.resolve() for stage in stages}
    found = []
    for stage in stages:
        content = stage.model_dump(mode="json")
        content["name"] = f"{stage.name}-{suffix}"
        if stage.init_from not in (None, "random", stage.name):
            places = Path(stage.output, str(stage.init_from)), Path(str(stage.init_from))  # by name, by path
            if any(place.resolve() in renamed for place in places):
                content["init_from"] = f"{str(stage.init_from).rstrip('/')}-{suffix}"
        found.append(parse_stage(content, f"--suffix {suffix}"))
    return found


def with_overrides(config: StageConfig, overrides: Sequence[str]) -> StageConfig:
    """A stage with some keys changed, as `--set` changes them. Raises ConfigError."""
    content = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(content, override, yaml.SafeLoader)
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


def _apply_override(content: dict[str, Any], override: str, loader: type[yaml.BaseLoader | yaml.SafeLoader]) -> None:
    """Sets one `a.b=value` in place; sections that the file leaves out are made."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set batch.size=64")
    try:
        parsed = yaml.load(value, Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = content
    for name in parents:
        if isinstance(node, list):
            node = node[_list_index(node, name, override)]
        else:
            is_text = loader is yaml.BaseLoader and isinstance(node.get(name), str)  # an empty section
            if node.get(name) is None or is_text:
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
