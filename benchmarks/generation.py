"""Tokens a second of `LLaVA.generate` and of plain transformers' `generate`, on the same export, taking turns.

    python benchmarks/generation.py --model runs/small-stage2/model --data data/scenes/held_out.json

Both answer the same questions to the same length, greedily, one by one and in batches; reading the pictures is counted
on both sides. A ratio above 1 means that LLaVA is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_train import LLaVA

Pair = tuple[Path, str]
Answer = Callable[[list[Pair]], list[str]]


class Plain:
    """What a user of transformers writes."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def __call__(self, pairs: list[Pair], n_tokens: int) -> list[str]:
        prompts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for _, text in pairs
        ]
        pictures = [Image.open(path).convert("RGB") for path, _ in pairs]
        inputs = self.processor(
            text=prompts, images=pictures, padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
        texts = self.processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def timed(answer: Answer, batch: list[Pair]) -> tuple[float, list[str]]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    answers = answer(batch)
    return time.perf_counter() - started, answers


def compare(ways: dict[str, Answer], batches: list[list[Pair]], n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each way for each batch. They take turns batch by batch: what else the machine does hits both."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(n_rounds + 1):
        for number, batch in enumerate(batches):
            answers = {}
            for name in sorted(ways, reverse=(turn + number) % 2 == 1):
                taken, answers[name] = timed(ways[name], batch)
                if turn:  # the first round is a warm-up
                    seconds[name].append(taken)
            assert answers["LLaVA"] == answers["plain"], "the two ways do not answer alike"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a file of data/draw_scenes.py")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, its end ignored")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()

    rows = json.loads(arguments.data.read_text(encoding="utf-8"))[: arguments.questions]
    texts = [row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows]
    pairs = [(arguments.data.parent / row["image"], text) for row, text in zip(rows, texts, strict=True)]
    llava = LLaVA.from_pretrained(arguments.model)
    plain = Plain(arguments.model, llava.device, llava.model.dtype)
    never = len(llava.processor.tokenizer) - 1
    llava._prompts.end_ids = [never]
    plain.model.generation_config.eos_token_id = never
    ways: dict[str, Answer] = {
        "LLaVA": lambda batch: llava.generate(batch, max_new_tokens=arguments.tokens, batch_size=len(batch)),
        "plain": lambda batch: plain(batch, arguments.tokens),
    }
    for size in (1, arguments.batch_size):
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        seconds = compare(ways, batches, arguments.rounds)
        ratios = [b / a for a, b in zip(seconds["LLaVA"], seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found = {
            "batch_size": size,
            "tokens_per_s": {
                name: round(size * arguments.tokens / statistics.median(each), 1) for name, each in seconds.items()
            },
            "ratio": round(middle, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "n_batches": len(ratios),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
