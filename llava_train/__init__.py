"""Trains LLaVA models in two stages: first the projector, then the projector and the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_train.use.llava import LLaVA as LLaVA

__version__ = "0.1.0"
__all__ = ["LLaVA", "__version__"]


def __getattr__(name: str) -> Any:
    """`from llava_train import LLaVA` without making every command wait for torch and transformers."""
    if name == "LLaVA":
        from llava_train.use.llava import LLaVA

        return LLaVA
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
