"""Tiny models in folders, as a stage leaves them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava_train.model.weights import export_model
from tests.tiny import encoder_of, model_section, tiny_llava

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 90), "blue")


def export_tiny(folder: Path, chat_template: str = "chatml") -> Path:
    """An exported model in `folder`."""
    llava = tiny_llava(model_section(chat_template=chat_template))
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), folder)
    return folder
