"""One question about one picture, with plain transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_train.data.images import decode_image
from llava_train.data.samples import IMAGE_PLACEHOLDER
from llava_train.errors import UserError
from llava_train.model.weights import RESULT_FOLDER


def answer_question(folder: Path, image: Path, question: str, max_new_tokens: int = 128) -> str:
    """The model's greedy answer.

    Args:
        folder: a finished run or its `model/`, or any LLaVA model that transformers loads.
        image: picture file.

    Raises:
        UserError: no model in the folder, no readable picture, or a question that holds `<image>`.
    """
    if (folder / RESULT_FOLDER).is_dir():
        folder = folder / RESULT_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model (config.json); name the folder of a finished stage 2")
    if IMAGE_PLACEHOLDER in question:
        raise UserError(f"the question holds {IMAGE_PLACEHOLDER}; leave it out, the picture stands before the question")
    picture = decode_image(image)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(str(folder))
    model = LlavaForConditionalGeneration.from_pretrained(str(folder), dtype="auto").to(device)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=picture, return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(device, model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()
