"""The page of the reference about the keys of a stage file, of `llava_train.config`: types, defaults and docstrings."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_train
from llava_train.stage_file import stage_schema

Schema = dict[str, Any]

_INTRODUCTION = """# Keys of a stage file

Made from `llava_train/config.py`. `llava-train schema` prints the same as JSON Schema, for editors; `--set
batch.max_tokens=8192` overrides a key for one start. Unknown keys, wrong types and contradictions are refused before a
model is loaded. Only keys without a default must be there.

**knob** marks the keys that decide neither what a step trains on nor what it learns: they may change when a run goes
on. A change of any other is refused (`on_bad_sample` and `batch.over_long` may leave `error`), unless
`--allow-config-change` is given.
"""


def stage_keys_page() -> str:
    """Markdown: a table of the keys at the top, then a section with a table for each section of the file."""
    schema = stage_schema()
    free = free_keys()
    top = "\n".join(_table(schema, schema, "", free))
    return "\n".join([_INTRODUCTION, top, "", *_sections(schema, schema, "", free, {})])


def free_keys() -> tuple[str, ...]:
    """`train.run_folder.FREE_KEYS`, read from the source: importing it takes torch."""
    source = (Path(inspect.getfile(llava_train)).parent / "train/run_folder.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FREE_KEYS":
            return tuple(ast.literal_eval(node.value))
    raise LookupError("train/run_folder.py has no FREE_KEYS")


def is_free(key: str, free: tuple[str, ...]) -> bool:
    return any(key == one or key.startswith(one + ".") for one in free)


def _sections(schema: Schema, of: Schema, prefix: str, free: tuple[str, ...], told: dict[str, str]) -> Iterator[str]:
    """The sections below `of`, each once: `told` says under which key a section was told already."""
    for key, value in of["properties"].items():
        for name in _references(value):
            path, section = prefix + key, schema["$defs"][name]
            if name in told:
                yield f"## {path} {{ #{path} }}\n\nKeys as in [{told[name]}](#{told[name]}).\n"
                continue
            told[name] = path
            yield f"## {path} {{ #{path} }}\n\n{_one_line(section.get('description', ''))}\n"
            yield from _table(schema, section, path + ".", free)
            yield ""
            yield from _sections(schema, section, path + ".", free, told)


def _table(schema: Schema, section: Schema, prefix: str, free: tuple[str, ...]) -> Iterator[str]:
    yield "| key | value | default | | |\n|---|---|---|---|---|"
    for key, value in section["properties"].items():
        path = prefix + key
        wanted = "**required**" if key in section.get("required", []) else _default(value)
        knob = "knob" if is_free(path, free) else ""
        anchor = "" if _references(value) else f'<a id="{path}"></a>'
        yield f"| {anchor}`{key}` | {_type(value, path)} | {wanted} | {_what(schema, value)} | {knob} |"


def _what(schema: Schema, value: Schema) -> str:
    """What a key means: its own docstring, or that of its section."""
    own = value.get("description", "")
    for name in _references(value):
        own = own or schema["$defs"][name].get("description", "")
    return _one_line(own).replace("|", "\\|")


def _type(value: Schema, path: str) -> str:
    """The values that a key may have, in words."""
    if "$ref" in value:
        return f"[section](#{path})"
    if "anyOf" in value:
        kinds = [_type(one, path) for one in value["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value["type"] == "array":
        return f"list of {_type(value['items'], path)}"
    if value["type"] == "object":
        more = value.get("additionalProperties")
        return f"mapping to {_type(more, path)}" if isinstance(more, dict) else "mapping"
    words = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}[value["type"]]
    return ", ".join([words, *_limits(value)])


def _limits(value: Schema) -> Iterator[str]:
    if "pattern" in value:
        yield f"of the form `{value['pattern']}`".replace("|", "\\|")
    low, above = value.get("minimum"), value.get("exclusiveMinimum")
    if value["type"] == "integer" and above is not None:
        low, above = above + 1, None
    if low is not None:
        yield f"at least {low}"
    if above is not None:
        yield f"above {above}"
    if "maximum" in value:
        yield f"at most {value['maximum']}"
    if "exclusiveMaximum" in value:
        yield f"below {value['exclusiveMaximum']}"


def _default(value: Schema) -> str:
    default = value.get("default")
    if default is None:
        return "none"
    if isinstance(default, dict):
        return "its defaults"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _references(value: Schema) -> list[str]:
    """Names of the sections that a key may hold."""
    inner = [value, *value.get("anyOf", []), value.get("items", {})]
    return [one["$ref"].rpartition("/")[2] for one in inner if "$ref" in one]


def _one_line(text: str) -> str:
    return " ".join(text.split())
