"""The notebooks as they are committed. That their cells run is tested by nbmake: `notebooks/conftest.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PATH_OF_A_MACHINE = re.compile(r"(?<![\w./])/(home|mnt|opt|private|root|tmp|usr|Users|var|work)/")


def outputs_of(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small(path: Path) -> None:
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_name_no_folder_of_the_machine_they_were_made_on(path: Path) -> None:
    texts = [json.dumps({**o, "data": {**o.get("data", {}), "image/png": ""}}) for o in outputs_of(path)]
    assert [text for text in texts if PATH_OF_A_MACHINE.search(text)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_without_errors_and_warnings(path: Path) -> None:
    kinds = [output.get("name", output["output_type"]) for output in outputs_of(path)]
    assert "display_data" in kinds
    assert "error" not in kinds
    assert "stderr" not in kinds
