"""In place of the parts of benchmarks/gpu.py, in a process that imports no torch."""

from __future__ import annotations

import os
import time
from typing import Any


def dies(pipe: Any, wanted: Any, names: list[str] | None, results: dict[str, Any]) -> None:
    """A process whose parts end in every way."""
    names = names or ["good", "ends", "hangs", "last"]
    pipe.send(("plan", (names, {"device": "d", "date": "2026-01-01"})))
    for name in names:
        pipe.send(("begins", 1.0 if name == "hangs" else 9999.0))
        if name == "ends":
            os._exit(9)
        if name == "hangs":
            time.sleep(9999)
        pipe.send(("done", {"found": name, "before": sorted(results)}))
