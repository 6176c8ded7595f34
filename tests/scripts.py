"""The scripts outside the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_script(path: str) -> ModuleType:
    """Imports a script by its path in the repository, under its own name: dataclasses look their module up."""
    script = ROOT / path
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    if str(script.parent) not in sys.path:  # as when the script is started: it may import its neighbours
        sys.path.append(str(script.parent))
    spec.loader.exec_module(module)
    return module
