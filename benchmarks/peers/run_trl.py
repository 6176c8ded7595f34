"""TRL's SFTTrainer with the best settings that it has for a vision-language model.

TRL 1.16 refuses packing and padding-free batches for data with pictures, and its fused head, which never holds all
logits on a GPU, is always on. Left to choose: the micro-batch, how weights are kept, activation checkpointing and the
kernels of liger for the layers (Triton: CUDA only). A variant is MICRO_BATCH, then `-amp` for float32 weights under
autocast (what TRL does to a model given by name) instead of bfloat16 ones (on a GPU with adapters under autocast), `-ckpt` for activation checkpointing.
Samples of a step are sorted by length, so that micro-batches are padded little; the loss is over the supervised tokens
of the whole step, as in llava_train.
"""

from __future__ import annotations

import torch
from datasets import Dataset, Image, List
from harness import Job, common_arguments, has, observe, read_job, weights_and_autocast
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job = read_job()
    first, *rest = job.variant.split("-")
    micro_batch, amp = int(first or job.content["micro_batch"]), "amp" in rest
    is_lora = "lora" in job.content["trainable"].get("language_model", {})
    bf16_weights, autocast = weights_and_autocast(job.content["precision"] == "bf16", job.device, is_lora, amp)
    settings = {
        **common_arguments(job, micro_batch),
        "bf16": autocast,
        "gradient_checkpointing": "ckpt" in rest,
        "use_liger_kernel": job.device == "cuda" and has("liger_kernel"),
        "assistant_only_loss": True,
        "max_length": None,
        "train_sampling_strategy": "sequential",
    }
    model = LlavaForConditionalGeneration.from_pretrained(
        job.workload / "model",
        dtype=torch.bfloat16 if bf16_weights else torch.float32,
        attn_implementation="flash_attention_2" if job.device == "cuda" and has("flash_attn") else "sdpa",
    )
    processor = AutoProcessor.from_pretrained(job.workload / "model")
    processor.chat_template = (job.workload / "template.jinja").read_text(encoding="utf-8")
    lora = freeze(model, job)
    observer, ends = observe(job.device)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=dataset_of(job),
        processing_class=processor,
        peft_config=lora,
        callbacks=[ends],
    )
    trainer.train()
    settings["weights"] = str(model.dtype)
    job.write(observer.with_losses(), settings, ["trl", "torch", "transformers", "accelerate", "peft"])


def freeze(model: LlavaForConditionalGeneration, job: Job) -> LoraConfig | None:
    """Freezes what does not train; returns the adapters, if there are to be some."""
    trainable = job.content["trainable"]
    model.model.vision_tower.requires_grad_(False)
    lora = trainable.get("language_model", {}).get("lora")
    if "language_model" not in trainable:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    if lora is None:
        return None
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )


def dataset_of(job: Job) -> Dataset:
    rows = []
    for sample in job.sorted_in_steps():
        roles = {"human": "user", "gpt": "assistant"}
        messages = [
            {"role": roles[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
            for turn in sample["conversations"]
        ]
        images = [str(job.workload / sample["image"])] if "image" in sample else []
        rows.append({"messages": messages, "images": images})
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("images", List(Image()))


if __name__ == "__main__":
    main()
