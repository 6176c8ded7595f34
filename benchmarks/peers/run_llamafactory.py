"""LLaMA-Factory's supervised fine-tuning with `neat_packing`, its fastest way on data of mixed lengths.

Variants:
    (none), pack1024   packs of 1,024 tokens (or another number) over all samples of the run; a step has as many as make
                       its batch on average, so the samples are the same and their steps are not
    exact              each step's samples are one pack, as long as the longest step: the same steps, more padding
    4                  no packing, micro-batches of so many samples of like lengths: the same steps
Where a step has several micro-batches, LLaMA-Factory averages the means of their losses (`model_accepts_loss_kwargs` is
off for vision-language models), so that tokens of micro-batches with few of them weigh more.

Packs must be a multiple of 8 long (the collator pads tokens to one, and position ids not: transformers then stops).
`pure_bf16` is refused without a GPU: there the weights are float32 under bfloat16 autocast.
"""

from __future__ import annotations

import json
from typing import Any

from harness import Job, common_arguments, has, observe, read_job
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import register_template
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp

_PACK = {"cpu": 1024, "cuda": 4096}
"""Tokens of a pack. On a CPU the dense mask of T x T makes longer ones slower."""


def main() -> None:
    job = read_job()
    register_template(
        name="benchmark",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>\n"]),
        mm_plugin=get_mm_plugin("llava", image_token="<image>"),
    )
    CustomSeq2SeqTrainer.save_model = lambda *_, **__: None  # the benchmark has no use for a model on disk
    write_data(job)
    settings = {**arguments(job), **batches(job)}
    observer, ends = observe(job.device)
    run_exp(settings, callbacks=[ends])
    job.write(observer.with_losses(), settings, ["llamafactory", "torch", "transformers", "accelerate", "peft"])


def write_data(job: Job) -> None:
    roles = {"human": "user", "gpt": "assistant"}
    is_unpacked = job.variant.isdecimal()
    rows = [
        {
            "messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in sample["conversations"]],
            "images": [str(job.workload / sample["image"])] if "image" in sample else [],
        }
        for sample in (job.sorted_in_steps() if is_unpacked else job.samples)
    ]
    job.scratch.mkdir(parents=True, exist_ok=True)
    (job.scratch / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    source = {
        "file_name": "data.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": tags,
    }
    (job.scratch / "dataset_info.json").write_text(json.dumps({"benchmark": source}), encoding="utf-8")


def batches(job: Job) -> dict[str, Any]:
    """How samples become micro-batches and steps, by the variant."""
    longest = max(sample["n_tokens"] for sample in job.samples)
    if job.variant.isdecimal():
        micro_batch = int(job.variant)
        n_micro_batches = job.content["batch_size"] // micro_batch
        batch = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": n_micro_batches}
        return {**batch, "cutoff_len": pack_length(longest)}
    packed = {"packing": True, "neat_packing": True, "per_device_train_batch_size": 1}
    if job.variant == "exact":
        cutoff = pack_length(max(sum(sample["n_tokens"] for sample in step) for step in job.steps()))
        size = job.content["batch_size"]
        return {**packed, "cutoff_len": cutoff, "preprocessing_batch_size": size, "gradient_accumulation_steps": 1}
    n_tokens = sum(sample["n_tokens"] for sample in job.samples)
    wanted = int(job.variant.removeprefix("pack") or _PACK[job.device])
    cutoff = max(pack_length(longest), pack_length(wanted - 1))
    packs = max(1, round(n_tokens / job.content["n_steps"] / cutoff))
    everything = len(job.samples)
    # All packs once: how many there are is known only when the data is packed, the step is always `packs` of them.
    return {
        **packed,
        "cutoff_len": cutoff,
        "preprocessing_batch_size": everything,
        "gradient_accumulation_steps": packs,
        "max_steps": -1,
        "num_train_epochs": 1,
    }


def pack_length(n_tokens: int) -> int:
    """The shortest `cutoff_len` for so many tokens: LLaMA-Factory takes one off and fills up to a multiple of 8."""
    return -(-(n_tokens + 1) // 8) * 8


def arguments(job: Job) -> dict[str, Any]:
    trainable = job.content["trainable"]
    lora = trainable.get("language_model", {}).get("lora")
    on_cuda = job.device == "cuda"
    bf16 = job.content["precision"] == "bf16"
    return {
        **common_arguments(job, 1),
        "model_name_or_path": str(job.workload / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if lora else "full",
        **({"lora_rank": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": 0.0} if lora else {}),
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": False,
        "freeze_language_model": "language_model" not in trainable,
        **({"additional_target": "multi_modal_projector"} if lora else {}),
        "dataset": "benchmark",
        "dataset_dir": str(job.scratch),
        "template": "benchmark",
        "flash_attn": "fa2" if on_cuda and has("flash_attn") else "sdpa",
        "enable_liger_kernel": on_cuda and has("liger_kernel"),
        "bf16": bf16,
        "pure_bf16": bf16 and on_cuda,
        "disable_gradient_checkpointing": True,
        "disable_shuffling": True,
        "overwrite_output_dir": True,
        "output_dir": str(job.scratch / "out"),
    }


if __name__ == "__main__":
    main()
