"""A model that others wrote, with a chat template."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_train.data.chat_templates import load_template
from llava_train.model.build import Llava
from llava_train.model.foreign import load_whole


def load_foreign(name: str | Path, dtype: torch.dtype | None = None, chat_template: str | None = None) -> Llava:
    """An original LLaVA (full or LoRA) or one of transformers, on the CPU, in evaluation mode, with sdpa.

    Args:
        name: a folder or a hub id.
        dtype: of all weights; None for the one they were saved in.
        chat_template: a name or a jinja file; None for the model's own. The original keeps none in its checkpoints and
            chooses by the folder's name: without one it is `vicuna_v1`, that of LLaVA-1.5.

    Raises:
        UserError: nothing that is understood, or parts that are missing. The message says what to do.
    """
    llava = load_whole(name, dtype)
    if chat_template or not llava.processor.chat_template:
        llava.processor.chat_template = load_template(chat_template or "vicuna_v1", llava.tokenizer)
    return llava
