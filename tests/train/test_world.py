from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from llava_train.errors import UserError
from llava_train.train.world import World, said_after


def test_a_wait_is_told_when_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    for wait_s in (0.01, 60.0, None):
        with said_after(wait_s, f"waits since {wait_s}"):
            time.sleep(0.2)
    assert capsys.readouterr().out == "waits since 0.01\n"


def test_a_file_that_rank_0_cannot_write_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/none/file: No such file or directory"):
        World(0, 1, torch.device("cpu")).on_main(lambda: (tmp_path / "none/file").write_text(""))
