from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from llava_train.errors import UserError
from llava_train.train.world import World, said_after


def test_a_wait_is_told_when_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    with said_after(0.01, "waits"):
        while "waits" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().out
    for wait_s in (9999.0, None):
        with said_after(wait_s, "waits longer"):
            time.sleep(0.05)
    assert said + capsys.readouterr().out == "waits\n"


def test_a_file_that_rank_0_cannot_write_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/none/file: No such file or directory"):
        World(0, 1, torch.device("cpu")).on_main(lambda: (tmp_path / "none/file").write_text(""))
