"""Where the CPU waits for the device: each place, and how often.

On CUDA PyTorch tells itself (`torch.cuda.set_sync_debug_mode`). Elsewhere nothing waits, but the operators that would
are known: those that must know a value, or how many there are, before they return.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""They wait where the index is a mask."""


def waits_of(call: Callable[[], Any], device: torch.device) -> Counter[str]:
    """How often `call` waits, by place: `llava_train/train/engine.py:102`."""
    if device.type != "cuda":
        with _WaitingOperators() as operators:
            call()
        return operators.places
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return Counter(f"{_short(warning.filename)}:{warning.lineno}" for warning in told)


class _WaitingOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name in _INDEXING and any(map(_is_mask, args[1]))):
            frames = traceback.extract_stack()[:-1]
            ours = [frame for frame in frames if "/torch/" not in frame.filename]
            self.places[f"{_short(ours[-1].filename)}:{ours[-1].lineno} ({name})"] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _short(path: str) -> str:
    """From the package on."""
    roots = [root.rstrip("/") + "/" for root in sys.path if root]
    return path[max((len(root) for root in roots if path.startswith(root)), default=0) :]
