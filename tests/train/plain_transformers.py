"""Uses exported models as somebody would who never heard of llava_train.

    python plain_transformers.py SPEC OUT

SPEC is JSON: {"models": {name: folder}, "samples": [{"messages": LLaVA turns, "image": path, "input_ids", "labels"}]}.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LogitsProcessor


class EndOfTurnAfterTwo(LogitsProcessor):
    """Makes the model want to end its turn after two tokens."""

    def __init__(self, n_prompt: int, end_of_turn_id: int) -> None:
        self.n_prompt, self.end_of_turn_id = n_prompt, end_of_turn_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.end_of_turn_id if input_ids.shape[1] >= self.n_prompt + 2 else 65
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([wanted]), 0.0)


@torch.no_grad()
def use(folder: str, samples: list) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    loss_sum, n_supervised, same_tokens, same_prompts = 0.0, 0, True, True
    for sample in samples:
        pictures = [Image.open(sample["image"])]
        text = processor.apply_chat_template(sample["messages"])
        inputs = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
        same_tokens &= inputs.input_ids[0].tolist() == sample["input_ids"]
        logits = model(**inputs).logits[0]
        labels = torch.tensor(sample["labels"])
        loss_sum += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        n_supervised += int((labels != -100).sum())

        question = sample["messages"][0]
        parts = [{"type": "image"}, {"type": "text", "text": question["content"].removeprefix("<image>\n")}]
        prompts = [
            processor.apply_chat_template([{**question, "content": content}], add_generation_prompt=True)
            for content in (question["content"], parts)
        ]
        same_prompts &= prompts[0] == prompts[1] and text.startswith(prompts[0])

    prompt = processor(text=prompts[0], images=pictures, add_special_tokens=False, return_tensors="pt")
    end_of_turn_id = next(label for label in reversed(samples[0]["labels"]) if label != -100)
    n_prompt = prompt.input_ids.shape[1]
    wants_to_end = [EndOfTurnAfterTwo(n_prompt, end_of_turn_id)]
    return {
        "loss": loss_sum / n_supervised,
        "same_tokens": same_tokens,
        "same_prompts": same_prompts,
        "n_generated": model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape[1] - n_prompt,
        "n_until_end": model.generate(**prompt, max_new_tokens=9, logits_processor=wants_to_end).shape[1] - n_prompt,
        "attention": model.config.text_config._attn_implementation,
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    results = {name: use(folder, spec["samples"]) for name, folder in spec["models"].items()}
    assert "llava_train" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
