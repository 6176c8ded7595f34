"""What contradicts what in a stage file: keys that cannot both be meant, and the user's own DeepSpeed keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_train.config import EngineSection, StageConfig


def contradictions(config: StageConfig) -> Iterator[str]:
    """Yields `key: what is wrong and what to do` for each pair of keys that cannot both be meant."""
    rates, engine, batch = config.trainable.learning_rates(), config.engine, config.batch
    if not rates:
        parts = ", ".join(type(config.trainable).model_fields)
        yield f"trainable: every part is frozen, nothing would train; list at least one of {parts}"
    if rates.keys() - {"projector"} and config.init_from is None:
        yield (
            "init_from: missing, but the stage trains more than the projector; name the run of the stage that "
            "trained the projector, or `random` to start from a new projector on purpose"
        )
    if batch.max_tokens < batch.max_sample_tokens:
        yield (
            f"batch.max_tokens: {batch.max_tokens} is below batch.max_sample_tokens ({batch.max_sample_tokens}), "
            "so the longest sample fits no pack; raise the first or lower the second"
        )
    if engine.offload_parameters and engine.zero != 3:
        yield f"engine.offload_parameters: needs engine.zero: 3, not {engine.zero}"
    if engine.kernels == "compile" and engine.activation_checkpointing == "selective":
        yield (
            "engine.activation_checkpointing: selective does not see into what engine.kernels: compile makes, which "
            "itself keeps only what is dear to compute again; choose none, full or auto"
        )
    if config.trainable.lora and config.trainable.lora.quantize_base:
        yield from _beside_4_bits(engine)
    if engine.offload_optimizer and engine.zero == 0:
        yield "engine.offload_optimizer: needs engine.zero: 1, 2 or 3, not 0"
    if config.loader.cache_features and config.trainable.vision_tower:
        yield (
            "loader.cache_features: a vision tower that trains has new features at every step; remove the key, or "
            "freeze the tower: remove trainable.vision_tower"
        )
    if config.eval and config.model.chat_template == "plain" and config.trainable.language_model:
        yield "model.chat_template: plain has no prompt to answer; a language model trains on a chat template"
    if config.eval and config.eval.questions and not config.eval.metric:
        yield "eval.questions: no score is computed over them; set eval.metric, or remove the key"
    yield from deepspeed_conflicts(config)


def _beside_4_bits(engine: EngineSection) -> Iterator[str]:
    key = "trainable.language_model.lora.quantize_base"
    if engine.zero == 3:
        yield f"{key}: 4-bit weights cannot be spread over GPUs by engine.zero: 3; set it to 2, or remove the key"
    if engine.offload_parameters:
        yield f"{key}: 4-bit weights stay on the GPU; remove engine.offload_parameters, or the key"
    if engine.precision != "bf16":
        yield f"{key}: the layers compute in bf16; set engine.precision to it, or remove the key"


def deepspeed_conflicts(config: StageConfig) -> Iterator[str]:
    """Yields a line for each key of the user's DeepSpeed JSON that the stage file owns with another value."""
    try:
        user = user_deepspeed(config.engine)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        yield f"engine.deepspeed: cannot read {config.engine.deepspeed!s:.200}: {why}"
        return
    offload = {True: "cpu", False: "none"}
    owned: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("batch.size", config.batch.size),
        "train_micro_batch_size_per_gpu": ("batch.max_tokens", None),
        "gradient_accumulation_steps": ("batch.max_tokens", None),
        "gradient_clipping": ("schedule.clip", config.schedule.clip or 0.0),
        "optimizer": ("trainable.*.lr", None),
        "scheduler": ("schedule.lr", None),
        "bf16.enabled": ("engine.precision", config.engine.precision == "bf16"),
        "bf16.check_grad_overflow": ("max_bad_steps", True),
        "fp16.enabled": ("engine.precision", False),
        "zero_optimization.stage": ("engine.zero", config.engine.zero),
        "zero_optimization.offload_optimizer.device": (
            "engine.offload_optimizer",
            offload[config.engine.offload_optimizer],
        ),
        "zero_optimization.offload_param.device": (
            "engine.offload_parameters",
            offload[config.engine.offload_parameters],
        ),
        "zero_optimization.compute_grad_norm": ("max_bad_steps", True),
        "zero_optimization.cpu_offload": ("engine.offload_optimizer", config.engine.offload_optimizer),
        "zero_optimization.cpu_offload_params": ("engine.offload_parameters", config.engine.offload_parameters),
        "zero_force_ds_cpu_optimizer": ("engine.offload_optimizer", False),
        "activation_checkpointing": ("engine.activation_checkpointing", None),
        "data_types.grad_accum_dtype": ("engine.precision", "fp32"),
        "steps_per_print": ("logging.every", None),
        "checkpoint": ("checkpoint", None),
    }
    for name in sorted({key.split(".")[0] for key in owned if "." in key} & user.keys()):
        if not isinstance(user[name], dict):
            yield f"engine.deepspeed: its key {name} must hold keys of its own, not {json.dumps(user[name])}"
    for key, (ours, value) in owned.items():
        theirs: Any = user
        for name in key.split("."):
            theirs = theirs.get(name) if isinstance(theirs, dict) else None
        if theirs not in (None, "auto", value):
            yield (
                f"engine.deepspeed: its key {key} ({json.dumps(theirs)}) conflicts with {ours} of the stage file"
                f"{'' if value is None else f' ({json.dumps(value)})'}; remove it from the DeepSpeed JSON "
                f"and set {ours}"
            )


def user_deepspeed(engine: EngineSection) -> dict[str, Any]:
    """The DeepSpeed keys that the user gave, as a dict. Raises OSError or ValueError."""
    if engine.deepspeed is None or isinstance(engine.deepspeed, dict):
        return dict(engine.deepspeed or {})
    content = json.loads(Path(engine.deepspeed).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
