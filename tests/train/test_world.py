from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_train.errors import UserError
from llava_train.train.world import World


def test_a_file_that_rank_0_cannot_write_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/none/file: No such file or directory"):
        World(0, 1, torch.device("cpu")).on_main(lambda: (tmp_path / "none/file").write_text(""))
