"""The original LLaVA (llava-torch, with its pins of 2023): its `train()`, model, trainer and collator.

Only its tokenization is replaced, by the workload's token ids, since it knows neither ChatML nor SmolLM2's tokenizer,
and the model is not written at the end. Variants:

    (none)   `--group_by_modality_length`, its recipe: the same samples, other steps
    exact    the samples in the workload's order, a step in one batch: the same steps and losses
    4        the same steps in micro-batches of so many samples of like lengths
    group4   as (none), in micro-batches of so many
Its loss is the mean over the micro-batch's supervised tokens; of several micro-batches the mean of the means.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
from harness import Job, common_arguments, has, observe, read_job
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train import train as original
from torch.utils.data import SequentialSampler


def main() -> None:
    job = read_job()
    given = job.variant.removeprefix("group") or job.content["micro_batch"]
    micro_batch = job.content["batch_size"] if given == "exact" else given
    in_groups = job.variant == "" or job.variant.startswith("group")
    settings = arguments(job, int(micro_batch), in_groups)
    give_data(job, in_order=not in_groups)
    observer, ends = observe(job.device, job.content["n_image_tokens"])
    original.LLaVATrainer = functools.partial(original.LLaVATrainer, callbacks=[ends])
    original.safe_save_model_for_hf_trainer = lambda *_, **__: None
    original.get_peft_state_maybe_zero_3 = original.get_peft_state_non_lora_maybe_zero_3 = lambda *_, **__: {}
    if job.content["precision"] == "fp32":
        CLIPVisionTower.to = stay_in_float32
    sys.argv = ["train.py", *(f"--{key}={value}" for key, value in settings.items())]
    attention = "flash_attention_2" if job.device == "cuda" and has("flash_attn") else None
    original.train(attn_implementation=attention)
    job.write(observer.with_losses(), settings, ["llava-torch", "torch", "transformers", "accelerate", "peft"])


def stay_in_float32(tower: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """What does not train in bfloat16 has its encoder in float16, which a CPU cannot compute."""
    return torch.nn.Module.to(tower, device)


def arguments(job: Job, micro_batch: int, in_groups: bool) -> dict[str, Any]:
    """Its script `finetune.sh` (or `pretrain.sh`), less DeepSpeed, which one process does not need."""
    parts, bf16 = job.workload / "original", job.content["precision"] == "bf16"
    trainable = job.content["trainable"]
    lora = trainable.get("language_model", {}).get("lora")
    settings = common_arguments(job, micro_batch)
    return {
        **settings,
        "model_name_or_path": parts / "language_model",
        "version": "v1",
        "vision_tower": parts / "vision_tower",
        "pretrain_mm_mlp_adapter": parts / "mm_projector.bin",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": "language_model" not in trainable,
        **(lora_arguments(lora) if lora else {}),
        "data_path": job.scratch / "data.json",
        "image_folder": job.workload,
        "lazy_preprocess": True,
        "model_max_length": 4096,
        "group_by_modality_length": in_groups,
        "gradient_checkpointing": job.device == "cuda",  # as its scripts: without, attention of 2023 needs too much
        "bf16": bf16,
        "tf32": job.device != "cpu",
    }


def lora_arguments(lora: dict[str, Any]) -> dict[str, Any]:
    return {"lora_enable": True, "lora_r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"]}


def give_data(job: Job, in_order: bool) -> None:
    """Lets its data set take the workload's token ids, and its trainer, if asked, the workload's order."""
    micro_batches_are_sorted = in_order and job.variant != "exact"
    samples = job.sorted_in_steps() if micro_batches_are_sorted else job.samples
    job.scratch.mkdir(parents=True, exist_ok=True)
    (job.scratch / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    tokens = json.loads((job.workload / "original" / "tokens.json").read_text(encoding="utf-8"))
    get_item = original.LazySupervisedDataset.__getitem__
    current = []

    def get_remembered(self: Any, i: int) -> Any:
        current[:] = [self.list_data_dict[i]["id"]]
        return get_item(self, i)

    def preprocess(*_: Any, **__: Any) -> dict[str, list[torch.Tensor]]:
        found = tokens["samples"][current[0]]
        return {key: [torch.tensor(found[key])] for key in ("input_ids", "labels")}

    class TokenIdsOnly:
        """What is left of a tokenizer where token ids are given. `<image>` pads: in the data -200 stands for it."""

        unk_token, padding_side, model_max_length = "<image>", "right", 4096
        pad_token_id = tokens["image_token_id"]

    original.transformers.AutoTokenizer.from_pretrained = lambda *_, **__: TokenIdsOnly()
    original.LazySupervisedDataset.__getitem__ = get_remembered
    original.preprocess = preprocess
    if in_order:
        original.LLaVATrainer._get_train_sampler = lambda self: SequentialSampler(self.train_dataset)


if __name__ == "__main__":
    main()
