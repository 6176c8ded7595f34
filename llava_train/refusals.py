"""What pydantic refuses in a stage file, in the words of a user: `key: what is wrong; what to write instead`.

pydantic's own texts ("Input should be a valid string") are never shown. A value is shown as it stands in the file: YAML
makes 1 of `001`, true of `on` and a date of `2024-01-01`, which nobody would recognise.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_train.errors import UserError

M = TypeVar("M", bound=BaseModel)
Problem = Any
"""One of `ValidationError.errors()`: a dict with `type`, `loc`, `input`, `msg` and maybe `ctx`."""

_WIDEST = 80
_TYPES = {
    "string_type": "a text",
    "string_unicode": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "mapping_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}
"""Kinds of problems that are a wrong type, and what is wanted. A key of several types has one of each."""
_LIMITS = {
    "finite_number": "must be a finite number, not {value}",
    "greater_than": "must be above {gt:g}, not {value}",
    "greater_than_equal": "must be at least {ge:g}, not {value}",
    "less_than": "must be below {lt:g}, not {value}",
    "less_than_equal": "must be at most {le:g}, not {value}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "{value} is no name; use letters, digits, `_`, `-` and `.`, a letter or digit first",
}
_READ_AS = {bool: "true or false", int: "a number", float: "a number", type(None): "nothing"}


_OF_A_KEY = "[key]"
"""What pydantic puts at the end of a location when the key itself is wrong."""


def explain(
    error: ValidationError, root: type[BaseModel], written: Any = None, overridden: Collection[str] = ()
) -> list[str]:
    """Return a line for each thing that is wrong, in the order of the keys.

    Args:
        root: what was validated.
        written: the same content with every scalar as the text that it was read from; None where there is no file.
        overridden: keys whose values come from `--set`, where a shell takes quotes away.
    """
    problems = error.errors()
    lines = []
    for problem in problems:
        location = tuple(step for step in problem["loc"] if not _is_union_tag(step))
        for line in _explain(problem, location, _wanted(location, problems), root, written).splitlines():
            if line and line not in lines:
                lines.append(line)
    for key in overridden:
        quoted = re.compile(rf'^({re.escape(key)}: .* write it) in quotes: ("[^"]*")$')
        lines = [quoted.sub(rf"\1 --set '{key}=\2'", line) for line in lines]
    return lines


class SectionError(UserError):
    """Values that no section of a stage file can hold. A line for each."""


def validated(model: type[M], **values: Any) -> M:
    """Make a section of values that do not come from a stage file. Raises SectionError."""
    try:
        return model(**values)
    except ValidationError as error:
        raise SectionError("\n".join(explain(error, model))) from None


def truth_values(
    content: Any, model: type[BaseModel], written: Any = None, location: tuple[Any, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield `key, what is wrong` for each truth value in the place of a number: pydantic would take it for 0 or 1."""
    for name, field in model.model_fields.items():
        value = content.get(name) if isinstance(content, dict) else None
        key, leaves = (*location, name), set(_leaves(field.annotation))
        if isinstance(value, bool) and leaves & {int, float} and bool not in leaves:
            off = ", or null for none" if type(None) in leaves else ""
            yield ".".join(map(str, key)), f"must be a number{off}, not {shown(value, _at(written, key))}"
        for inner in _models_in(field.annotation):
            if isinstance(value, list):
                for number, entry in enumerate(value):
                    yield from truth_values(entry, inner, written, (*key, number))
            else:
                yield from truth_values(value, inner, written, key)


def _explain(problem: Problem, location: tuple[Any, ...], wanted: str, root: type[BaseModel], written: Any) -> str:
    kind, context, key = problem["type"], problem.get("ctx", {}), ".".join(map(str, location))
    if kind == "invalid_key" or location[-1:] == (_OF_A_KEY,):
        name = problem["input"] if location[-1:] == (_OF_A_KEY,) else location[-1]
        return f'{key.removesuffix(f".{_OF_A_KEY}")}: a key must be a text; write it in quotes: "{name}"'
    if kind == "extra_forbidden":
        return _unknown_key(key, location, root)
    if kind == "missing":
        return f"{key}: required, but missing"
    if kind == "value_error":
        message = str(context["error"])
        return f"{key}: {message}" if key else message
    value = shown(problem["input"], _at(written, problem["loc"]))
    if kind == "literal_error":
        near = difflib.get_close_matches(str(problem["input"]), _plain(context["expected"]), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: {value} is not allowed; allowed: {context['expected']}{hint}"
    if kind in _LIMITS:
        return f"{key}: {_LIMITS[kind].format(**context, value=value)}"
    if kind not in _TYPES:
        return f"{key}: {value} cannot be used here"
    if not wanted:
        return ""
    return f"{key}: must be {wanted}, {_not(problem['input'], value, 'text' in wanted)}"


def _wanted(location: tuple[Any, ...], problems: Sequence[Problem]) -> str:
    """The types that a key may have, joined by "or"; empty where one of them fits and something below it is wrong."""
    names: dict[str, None] = {}
    for problem in problems:
        other = tuple(step for step in problem["loc"] if not _is_union_tag(step))
        if other == location and problem["type"] in _TYPES:
            names[_TYPES[problem["type"]]] = None
        elif other[: len(location)] == location:
            return ""
    return " or ".join(names)


def _not(value: Any, text: str, wants_text: bool) -> str:
    """The end of a sentence: what stands there, and the quotes that make a text of it."""
    if not wants_text or isinstance(value, str | list | dict):
        return f"not {text}" if value is not None or text not in ("", "nothing") else "but it is empty"
    if text in ("", "nothing", "null"):
        return "but it is empty"
    return f'but YAML reads {text} as {_READ_AS.get(type(value), "a date")}; write it in quotes: "{text}"'


def shown(value: Any, written: Any = None) -> str:
    """A value as it stands in the file, shortened; text in quotes."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(written, str):
        text = written
    elif value is None or isinstance(value, bool):
        text = {None: "nothing", True: "true", False: "false"}[value]
    else:
        text = repr(value) if isinstance(value, int | float | list | dict) else str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _unknown_key(key: str, location: tuple[Any, ...], root: type[BaseModel]) -> str:
    allowed = sorted(_keys_at(location[:-1], root))
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    if location[-1] == "lora":
        hint = "LoRA goes below trainable.language_model, beside its lr; "
    return f"{key}: unknown key; {hint}allowed here: {', '.join(allowed)}"


def _at(written: Any, location: Sequence[Any]) -> Any:
    """The text of the file at a location, which may hold names of alternatives; None where there is none."""
    for step in location:
        try:
            written = written[step]
        except (KeyError, IndexError, TypeError):
            if not _is_union_tag(step):
                return None
    return written


def _plain(expected: str) -> list[str]:
    return [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]


def _is_union_tag(step: Any) -> bool:
    """pydantic adds the name of the tried alternative to a location; users don't write that."""
    alternatives = ("str", "int", "RandomLanguageModel", "RandomVisionTower")
    return step in alternatives or str(step).startswith(("dict[", "list[", "function-", "constrained-"))


def _keys_at(location: Sequence[Any], root: type[BaseModel]) -> set[str]:
    """Names of the keys that are allowed below a location, over all alternatives of its type."""
    models: list[type[BaseModel]] = [root]
    for step in location:
        if isinstance(step, int):
            continue
        fields = [model.model_fields[step].annotation for model in models if step in model.model_fields]
        models = [model for annotation in fields for model in _models_in(annotation)]
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    return (leaf for leaf in _leaves(annotation) if isinstance(leaf, type) and issubclass(leaf, BaseModel))


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types that a key, or an entry of its list, may have."""
    origin = typing.get_origin(annotation)
    if origin in (list, typing.Union, types.UnionType, Annotated):
        arguments = typing.get_args(annotation)
        for argument in arguments[:1] if origin is Annotated else arguments:
            yield from _leaves(argument)
    else:
        yield annotation
