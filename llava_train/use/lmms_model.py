"""A model as lmms-eval's `llava_hf` reads it right.

`llava_hf` (0.7) lets the tokenizer put a begin-of-sequence token before a text that the chat template may have begun
with one, and ends answers at the tokenizer's end-of-sequence token alone. So the model of a Llama sees two beginnings,
and where a turn ends with another token (gemma: `<end_of_turn>`) answers run on to their limit. Nothing says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoProcessor, GenerationConfig, LlavaProcessor, PreTrainedTokenizerBase


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
    """Changes chat template and end-of-sequence token where `llava_hf` would use them wrong; returns whether it did.

    Args:
        ends: tokens that end an answer.
    """
    tokenizer, template, changes = processor.tokenizer, processor.chat_template, ""
    if template is None:
        return False
    first = tokenizer(_render(tokenizer, changes + template)).input_ids[:2]
    if first == [tokenizer.bos_token_id] * 2:
        changes += "{%- set bos_token = '' -%}\n"
    whole = _render(tokenizer, changes + template, answer="Yes.")
    end = next((token for token in reversed(tokenizer(whole).input_ids) if token in ends), tokenizer.eos_token_id)
    if end != tokenizer.eos_token_id:
        changes += f"{{%- set eos_token = {json.dumps(tokenizer.eos_token or '')} -%}}\n"
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    processor.chat_template = changes + template
    return bool(changes)


def _render(tokenizer: PreTrainedTokenizerBase, template: str, answer: str | None = None) -> str:
    turns = [("user", "Is it?"), *([("assistant", answer)] if answer else [])]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answer is None
        )
    )


def _ends(folder: Path) -> set[int]:
    if not (folder / "generation_config.json").is_file():
        return set()
    ends = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])
