from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_train.train.checkpoint import is_finite


@pytest.mark.parametrize(
    ("rank", "share", "finite"),
    [
        (0, [1.0, 2.0, 3.0], True),
        (0, [1.0, 2.0, math.nan], False),
        (1, [4.0, 5.0, math.nan], True),
        (1, [4.0, math.inf, 0.0], False),
        (2, [math.nan, math.nan, math.nan], True),
    ],
)
def test_the_padding_of_zero_3_which_nobody_fills_is_no_harm(
    rank: int, share: list[float], finite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter of 5 on ranks that hold 3 each."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel = torch.tensor(share), 5
    engine: Any = SimpleNamespace(module=SimpleNamespace(parameters=lambda: [parameter]))
    assert is_finite(engine) is finite
