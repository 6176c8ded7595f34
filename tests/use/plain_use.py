"""Uses exported models with nothing but transformers, of whichever version is first on the path.

    python plain_use.py SPEC OUT

SPEC is JSON: {"models": {name: folder}, "image": path, "question": text}. OUT gets what each model makes of it.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Absent(importlib.abc.MetaPathFinder):
    """llava_train is installed where this runs, and must not help."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "llava_train":
            raise ImportError("this process has no llava_train")


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LogitsProcessor  # noqa: E402


class EndOfTurnAfterTwo(LogitsProcessor):
    """Makes the model want to end its turn after two tokens."""

    def __init__(self, n_prompt: int, wanted: int) -> None:
        self.n_prompt, self.wanted = n_prompt, wanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.wanted if input_ids.shape[1] >= self.n_prompt + 2 else 65
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([wanted]), 0.0)


@torch.no_grad()
def use(folder: str, image: str, question: str) -> dict:
    processor = AutoProcessor.from_pretrained(folder)
    model, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    as_parts = [{"type": "image"}, {"type": "text", "text": question}]
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in (as_parts, f"<image>\n{question}")
    ]
    picture = Image.open(image)
    inputs, without = (
        processor(text=prompts[0], images=picture, return_tensors="pt", add_special_tokens=added)
        for added in (True, False)
    )
    logits = model(**inputs).logits[0]
    adapted = logits
    if (Path(folder) / "adapter").is_dir():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, folder, subfolder="adapter").eval()(**inputs).logits[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_prompt, eos_token_id = inputs.input_ids.shape[1], tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    length = {
        end: model.generate(
            **inputs, max_new_tokens=6, do_sample=False, logits_processor=[EndOfTurnAfterTwo(n_prompt, end)]
        ).shape[1]
        - n_prompt
        for end in ends
    }
    return {
        "prompts": prompts,
        "prompt_of_tokenizer": tokenizer.apply_chat_template(
            [{"role": "user", "content": f"<image>\n{question}"}], tokenize=False, add_generation_prompt=True
        ),
        "input_ids": inputs.input_ids[0].tolist(),
        "same_without_special_tokens": inputs.input_ids.tolist() == without.input_ids.tolist(),
        "pixel_values": inputs.pixel_values[0].tolist(),
        "logits": logits.float().tolist(),
        "logits_with_adapter": adapted.float().tolist(),
        "loading": {key: sorted(map(str, value)) for key, value in loading.items() if value},
        "n_generated": length,
        "eos_token_id": eos_token_id,
        "dtype": str(model.dtype),
        "rope": getattr(model.config.text_config, "rope_theta", None),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    found = {name: use(folder, spec["image"], spec["question"]) for name, folder in spec["models"].items()}
    assert "llava_train" not in sys.modules
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "models": found}))


if __name__ == "__main__":
    main()
