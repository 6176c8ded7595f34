"""A model as lmms-eval's `llava_hf` reads it right.

`llava_hf` (0.7) lets the tokenizer put a begin-of-sequence token before a text that the chat template may have begun
with one, and ends answers at the tokenizer's end-of-sequence token alone. So the model of a Llama sees two beginnings,
and where a turn ends with another token (gemma: `<end_of_turn>`) answers run on to their limit. Nothing says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoProcessor, GenerationConfig, LlavaProcessor


def prepared(folder: Path, place: Path) -> Path:
    """The folder itself, or one below `place` with links to its weights and a processor that `llava_hf` uses right."""
    processor = AutoProcessor.from_pretrained(str(folder))
    if not adapt(processor, _ends(folder)):
        return folder
    copy = place / folder.parent.name / folder.name  # lmms-eval names results after the last two parts
    if copy.exists():
        shutil.rmtree(copy)
    copy.mkdir(parents=True)
    processor.save_pretrained(str(copy))
    for file in folder.iterdir():
        if not (copy / file.name).exists():
            (copy / file.name).symlink_to(file.resolve())
    return copy.absolute()


def adapt(processor: LlavaProcessor, ends: set[int]) -> bool:
    """Lets the chat template alone begin a text, and an answer end where a turn does; returns whether that changed it.

    Args:
        ends: tokens that may end an answer.
    """
    tokenizer, template = processor.tokenizer, processor.chat_template
    if template is None:
        return False
    changed = tokenizer(_render(processor)).input_ids[:2] == [tokenizer.bos_token_id] * 2
    if changed:
        tokenizer.add_bos_token = tokenizer.init_kwargs["add_bos_token"] = False
    _, _, after = _render(processor, answer="Yes.").rpartition("Yes.")
    end = next((token for token in tokenizer(after, add_special_tokens=False).input_ids if token in ends), None)
    if end not in (None, tokenizer.eos_token_id):
        processor.chat_template = f"{{%- set eos_token = {json.dumps(tokenizer.eos_token or '')} -%}}\n{template}"
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        changed = True
    return changed


def _render(processor: LlavaProcessor, answer: str | None = None) -> str:
    turns = [("user", "Is it?"), *([("assistant", answer)] if answer else [])]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


def _ends(folder: Path) -> set[int]:
    if not (folder / "generation_config.json").is_file():
        return set()
    ends = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])
