from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script
from tests.tiny import stage_content, write_data

startup = load_script("benchmarks/startup.py")


def test_a_start_is_told_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for of_this_rank in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(of_this_rank, raising=False)
    import yaml

    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(stage_content(write_data(tmp_path, 6))))
    found = startup.start(path, [])
    parts = [seconds for name, seconds in found.items() if name not in ("total", "command")]
    assert {"imports", "model", "engine", "first step"} <= found.keys()
    rounding_s = 0.1
    assert abs(sum(parts) - found["total"]) < rounding_s * len(found)
    assert found["total"] < found["command"] + rounding_s, "the first step ends before its process"
