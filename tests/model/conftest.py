from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import originals


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the language model and the vision tower."""
    return originals.save_parts(tmp_path_factory.mktemp("parts"))
