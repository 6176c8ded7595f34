"""What benchmarks take from the package is there: those for GPUs run seldom, and not where the tests do."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


def missing(tree: ast.Module) -> Iterator[str]:
    """Yields the names that a script imports from the package, or asks a module of the package for, and which are not there."""
    modules: dict[str, ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llava_train":
            for alias in node.names:
                value = _of(str(node.module), alias.name)
                if value is None:
                    yield f"{node.module}.{alias.name}"
                elif isinstance(value, ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr):
                yield f"{module.__name__}.{node.attr}"


def _of(module: str, name: str) -> Any:
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        try:
            return importlib.import_module(f"{module}.{name}")
        except ImportError:
            return None
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_everything_that_a_benchmark_takes_from_the_package_is_there(script: Path) -> None:
    assert list(missing(ast.parse(script.read_text(encoding="utf-8")))) == []


def test_what_is_not_there_is_found() -> None:
    source = """
from llava_train.model import attention, nothing
from llava_train.devices import DTYPES, Missing

def late() -> None:
    from llava_train.model import kernels as made
    attention.varlen_kernel(), attention._torch_varlen(), made.layers_of, made.gone
"""
    package = "llava_train"
    assert sorted(missing(ast.parse(source))) == [
        f"{package}.devices.Missing",
        f"{package}.model.attention._torch_varlen",
        f"{package}.model.kernels.gone",
        f"{package}.model.nothing",
    ]
