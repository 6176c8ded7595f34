"""Whatever names a trained model -> the model and its processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from llava_train.config import StageConfig
from llava_train.data.chat_templates import load_template
from llava_train.devices import DTYPES
from llava_train.errors import UserError
from llava_train.failures import reason
from llava_train.files import read_manifest
from llava_train.git_lfs import lfs_problem_of_model
from llava_train.model.build import Llava, build_llava
from llava_train.model.foreign import load_whole
from llava_train.model.quantize import is_quantized, round_like_nf4
from llava_train.model.trainable import part_module
from llava_train.model.weights import ADAPTER_FOLDER, PROJECTOR_CARD, PROJECTOR_FILE, RESULT_FOLDER, load_init
from llava_train.stage_file import RUN_CARD, load_run_card
from llava_train.user_paths import expand

_NOT_QUANTIZED = ["vision_tower", "multi_modal_projector", "lm_head"]


class LoadError(UserError):
    """There is no model to use. The message names the folder and the mend."""


def load_llava(
    name: str | Path,
    dtype: torch.dtype | None = None,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Llava:
    """Loads a model on the CPU, with its chat template, in evaluation mode and with ordinary attention (sdpa).

    Args:
        name: a run folder (of stage 1: its projector between the parts it was trained for), its `model/`, the
            `adapter/` of a LoRA run, an original LLaVA checkpoint, a llava-hf folder, or a hub id.
        dtype: of all weights; None for the one they were saved in.
        chat_template: a name or a jinja file; None for the model's own. The original LLaVA keeps none in its
            checkpoints: without one it is `vicuna_v1`, that of LLaVA-1.5.
        settings: for transformers' `from_pretrained`, such as `quantization_config`.

    Raises:
        LoadError: no model there, an unfinished run, or one that `settings` cannot be used with.
        BuildError, HandOffError: parts of the run that are missing or have changed.
    """
    name = expand(str(name))
    folder = _result_of(Path(name))
    if problem := lfs_problem_of_model(folder):
        raise LoadError(problem)
    is_adapter = folder.name == ADAPTER_FOLDER and (folder.parent / RUN_CARD).is_file()
    if is_adapter or (folder / PROJECTOR_CARD).is_file():
        if settings:
            raise LoadError(f"{name} is not a whole model, which quantization needs; run `llava-train export` first")
        llava = load_base(folder.parent, dtype)
        if is_adapter:
            _add_adapter(llava, folder)
    else:
        trusted = {"trust_remote_code": True} if trust_remote_code else {}
        llava = load_whole(folder if folder.exists() else name, dtype, **settings, **trusted)
    if chat_template or not llava.processor.chat_template:
        llava.processor.chat_template = load_template(expand(chat_template or "vicuna_v1"), llava.tokenizer)
    llava.model.model.language_model.set_attn_implementation("sdpa")
    llava.model.eval()
    return llava


def load_base(run_dir: Path, dtype: torch.dtype | None = None) -> Llava:
    """What the stage of a run began with, its projector trained; without the adapters of LoRA.

    Raises:
        LoadError: no finished run.
        BuildError, HandOffError: parts of the run that are missing or have changed.
    """
    is_projector = (run_dir / RESULT_FOLDER / PROJECTOR_CARD).is_file()
    config = run_config(run_dir, ["model"] if is_projector else ["model", "init_from"])
    llava = build_llava(config.model, config.image, dtype or DTYPES[config.engine.precision], config.seed)
    llava.processor.chat_template = load_template(config.model.chat_template, llava.tokenizer)
    if is_projector:
        load_init(str(run_dir), llava.model, config.model)
        return llava
    if config.start is not None:
        load_init(config.start, llava.model, config.model)
    if is_quantized(config.trainable):
        round_like_nf4(llava.model)  # the adapter was trained on such weights
    part_module(llava.model, "projector").load_state_dict(load_file(run_dir / ADAPTER_FOLDER / PROJECTOR_FILE))
    return llava


def run_config(run_dir: Path, needed: Sequence[str] = ()) -> StageConfig:
    """The stage file that a run was trained with; `needed` as in `load_run_card`. Raises LoadError, ConfigError."""
    if not (run_dir / RUN_CARD).is_file():
        raise LoadError(f"{run_dir} holds no {RUN_CARD}, which says what parts its projector belongs to")
    return load_run_card(run_dir, needed)


def _result_of(folder: Path) -> Path:
    """The folder with the weights. Raises LoadError."""
    if (folder / RUN_CARD).is_file() or (folder / RESULT_FOLDER).is_dir():
        result = folder / RESULT_FOLDER
        if read_manifest(result) is None:
            raise LoadError(f"{folder} is a run without a finished {RESULT_FOLDER}/; start its stage again")
        return result
    if folder.is_dir() and not any(folder.iterdir()):
        raise LoadError(f"{folder} is empty; name a run, its {RESULT_FOLDER}/, or a hub id")
    return folder


def _add_adapter(llava: Llava, folder: Path) -> None:
    try:
        PeftModel.from_pretrained(llava.model, str(folder)).merge_and_unload()
    except (OSError, RuntimeError, ValueError) as error:
        raise LoadError(f"the adapter in {folder} does not fit its base model: {reason(error)}") from error


def quantized(quantization: str, place: torch.device) -> dict[str, Any]:
    """Settings of `load_llava` for a language model in 4 (NF4) or 8 bits. Raises UserError."""
    if quantization not in ("4bit", "8bit"):
        raise UserError(f"quantization {quantization!r} is not known; choose 4bit or 8bit")
    if place.type != "cuda":
        raise UserError(f"{quantization}: quantized weights need a CUDA device")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{quantization}: quantized weights need bitsandbytes; pip install 'llava_train[qlora]'"
        ) from error
    bits: dict[str, dict[str, Any]] = {
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        "8bit": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(llm_int8_skip_modules=_NOT_QUANTIZED, **bits[quantization])
    return {"quantization_config": config, "device_map": {"": place}}
