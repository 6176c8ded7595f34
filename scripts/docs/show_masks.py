"""Writes the examples of docs/explanation/masks.md: what the encoder that trains supervises of a conversation.

python scripts/docs/show_masks.py              # writes them between the marks; a test compares
"""

from __future__ import annotations

import re
import sys
import textwrap
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from llava_train.config import RandomLanguageModel  # noqa: E402
from llava_train.data.chat import IGNORED, ChatEncoder  # noqa: E402
from llava_train.data.chat_templates import load_template  # noqa: E402
from llava_train.data.samples import IMAGE_PLACEHOLDER, Sample, Turn  # noqa: E402
from llava_train.model.processor import load_tokenizer  # noqa: E402

PAGE = ROOT / "docs/explanation/masks.md"
TEMPLATES = ("vicuna_v1", "chatml", "plain")
N_IMAGE_TOKENS = 576
TURNS = (
    Turn("user", "<image>\nWhat is on the roof?"),
    Turn("assistant", "A cat."),
    Turn("user", "What colour is it?"),
    Turn("assistant", "Black."),
)
_EXAMPLE = re.compile(r"(<!-- (\w+), by scripts/docs/show_masks.py -->\n).*?(<!-- end -->)", re.DOTALL)


def with_examples(page: str) -> str:
    """The page with its examples made anew."""
    return _EXAMPLE.sub(lambda match: f"{match.group(1)}{example(match.group(2))}{match.group(3)}", page)


def example(name: str) -> str:
    """A conversation as a template writes it, what is supervised between ⟦ and ⟧, and the numbers of its tokens."""
    tokenizer = load_tokenizer(RandomLanguageModel(config={}))
    encoder = ChatEncoder(tokenizer, load_template(name, tokenizer), N_IMAGE_TOKENS, max_tokens=2048)
    turns = TURNS[:2] if name == "plain" else TURNS
    encoded = encoder.encode(Sample("example", (None,), turns))  # type: ignore[arg-type] # the picture is not looked at
    ids, is_supervised = encoded.input_ids, encoded.labels != IGNORED
    runs = groupby(range(len(ids)), key=lambda i: bool(is_supervised[i]))
    texts = [(supervised, tokenizer.decode(ids[list(run)])) for supervised, run in runs]
    shown = "".join(f"⟦{text}⟧" if supervised else text for supervised, text in texts)
    shown = shown.replace(IMAGE_PLACEHOLDER * N_IMAGE_TOKENS, f"{IMAGE_PLACEHOLDER} x {N_IMAGE_TOKENS}")
    shown = shown.replace("\n", "↵\n").replace("\n⟧", "⟧\n").rstrip("\n")
    wrapped = [part for line in shown.split("\n") for part in textwrap.wrap(line, 76)]
    return "\n```text\n" + "\n".join(wrapped) + "\n```\n\n"


if __name__ == "__main__":
    PAGE.write_text(with_examples(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
