"""transformers 4 beside the transformers 5 of the environment, for tests of exported models."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

_WANTED = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
"""The last of version 4, and what it cannot share with version 5; all else comes from the environment."""
_PLACE = Path(sys.prefix) / "transformers4"


@pytest.fixture(scope="session")
def transformers4() -> Path:
    """A folder to put first on PYTHONPATH, installed once for an environment."""
    with FileLock(f"{_PLACE}.lock"):
        stamp = _PLACE / "installed"
        if not stamp.is_file() or stamp.read_text() != " ".join(_WANTED):
            shutil.rmtree(_PLACE, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(_PLACE)]
            done = subprocess.run([*pip, *_WANTED], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"pip cannot install transformers 4: {done.stderr.strip()[-200:]}")
            stamp.write_text(" ".join(_WANTED))
    return _PLACE
