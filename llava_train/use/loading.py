"""Whatever names a trained model -> the model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_train.model.build import Llava


def load_llava(name: str | Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Llava:
    """Loads a model on the CPU, with its chat template, in evaluation mode and with ordinary attention (sdpa).

    Args:
        name: a run folder (of stage 1: its projector between the parts it was trained for), its `model/`, the
            `adapter/` of a LoRA run, an original LLaVA checkpoint, a llava-hf folder, or a hub id.
        dtype: of all weights; None for the one they were saved in.

    Raises:
        UserError: no model there, an unfinished run, or parts that are missing. The message says what to do.
    """
    raise NotImplementedError
