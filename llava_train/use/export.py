"""A trained model as a folder for others: transformers 4 and 5, vLLM, SGLang, lmms-eval, the hub.

    load -> write beside OUT -> load that by plain transformers and compare the logits -> rename to OUT

so that OUT never holds a model that computes something else, or half of one. Of a run with LoRA, OUT is the language
model as it was and the trained projector, and the adapter (peft's format) in OUT/adapter, unless it shall be merged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llava_train.devices import cast_parameters, pick_dtype
from llava_train.errors import UserError
from llava_train.files import folder_written_aside, read_manifest, share, write_manifest, written_aside
from llava_train.model.build import Llava
from llava_train.model.export_files import write_model
from llava_train.model.export_template import portable
from llava_train.model.foreign_files import MM_PROJECTOR_FILE
from llava_train.model.mm_projector import save_mm_projector
from llava_train.model.trainable import part_module
from llava_train.model.weights import ADAPTER_FOLDER, PROJECTOR_FILE, RESULT_FOLDER
from llava_train.stage_file import RUN_CARD
from llava_train.use.loading import load_base, load_llava, run_config
from llava_train.use.model_card import ModelCard
from llava_train.use.prompts import Prompts

_CPU = torch.device("cpu")
_SAME, _MERGED, _MERGED_IN_16_BITS = 1e-5, 1e-3, 0.1
"""Largest difference of logits, as a share of the largest: of the same weights, and of an adapter and merged ones."""


class ExportError(UserError):
    """A model cannot be exported. The message says why and what to do; OUT is as it was."""


@dataclass(frozen=True)
class Exported:
    """What an export found when it loaded what it had written. Differences are the largest of any logit."""

    folder: Path
    difference: float
    """From the model in memory."""
    by_dtype: float
    """What the change of the dtype does to the logits."""
    largest: float
    """Of the model's logits, to compare with."""
    by_adapter: float | None
    """From the trained model, with the adapter on; None where no adapter was written."""


@dataclass(frozen=True)
class _Trial:
    """A prompt about a picture, and what a model makes of it."""

    input_ids: torch.Tensor  # int64 [1, T]
    pixel_values: torch.Tensor  # float32 [1, 3, H, W]
    logits: torch.Tensor  # float32 [T, V]
    dtype: torch.dtype
    """Of the model's weights."""


def export(
    source: str,
    out: Path,
    dtype: torch.dtype | None = None,
    merge_lora: bool = False,
    overwrite: bool = False,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
) -> Exported:
    """Exports a run, or any model that `load_llava` loads, to the folder `out`.

    Args:
        dtype: of the weights; None for the one they have.
        merge_lora: write adapters into the weights, not beside them.
        overwrite: replace an earlier export in `out`.
        chat_template: a name or a jinja file; None for the model's own, as `load_llava`.
        name: by which the model card tells how to load it; default: that of `out`.

    Raises:
        ExportError: `out` is taken or cannot be written to, or what was written computes something else.
        LoadError, BuildError, HandOffError: the source cannot be loaded.
    """
    _check_out(out, overwrite)
    llava = load_llava(source, chat_template=chat_template, trust_remote_code=trust_remote_code)
    card = ModelCard.of(source, _run_of(Path(source)), llava)
    adapter = None if merge_lora else _adapter_of(Path(source))
    trained = by_adapter = None
    if adapter:
        trained = _try(llava.model, llava.processor)
        llava = _without_adapter(adapter.parent, llava)
    with _beside(out.absolute()) as folder:
        before = _try(llava.model, llava.processor)
        cast_parameters(llava.model, dtype or llava.model.dtype)
        _write(llava, folder)
        in_memory = _try(llava.model, llava.processor) if dtype else before
        _refuse_overflow(in_memory)
        del llava  # two models may be too many
        model, processor = _load_plainly(folder, in_memory.dtype)
        difference = _compare(in_memory, _try(model, processor, as_users_do=True), _SAME)
        if adapter and trained:
            by_adapter = _add_adapter(adapter, folder, model, processor, trained, {before.dtype, in_memory.dtype})
        card.write(folder, name or out.absolute().name, has_adapter=adapter is not None)
        write_manifest(folder, exported_from=source)
    return Exported(out, difference, _difference(before, in_memory), float(before.logits.abs().max()), by_adapter)


def export_projector(source: str, out: Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """Writes the projector as `mm_projector.bin` of the original LLaVA into a folder; returns the file's path.

    Raises:
        ExportError: the file exists.
        LoadError, BuildError, HandOffError: the source cannot be loaded.
    """
    path = out / MM_PROJECTOR_FILE
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; --overwrite replaces it")
    llava = load_llava(source, dtype)
    with written_aside(path, "wb") as file:
        save_mm_projector(llava.model, file)
    return path


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuses a folder that something else lives in."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is None or "exported_from" not in manifest:
        raise ExportError(f"{out} exists and is no earlier export; name another folder")
    if not overwrite:
        raise ExportError(f"{out} holds an export of {manifest['exported_from']}; --overwrite replaces it")


def _run_of(source: Path) -> Path | None:
    """The run that a source is, or is the `model/` or `adapter/` of."""
    places = [source, source.parent] if source.name in (RESULT_FOLDER, ADAPTER_FOLDER) else [source]
    return next((folder for folder in places if (folder / RUN_CARD).is_file()), None)


def _adapter_of(source: Path) -> Path | None:
    """The adapter of a run with LoRA; None for a run without and for `model/`, which has it in its weights."""
    run_dir = None if source.name == RESULT_FOLDER else _run_of(source)
    found = run_dir and (run_dir / ADAPTER_FOLDER / "adapter_config.json").is_file()
    return run_dir / ADAPTER_FOLDER if run_dir and found else None


def _without_adapter(run_dir: Path, trained: Llava) -> Llava:
    """A LoRA run's model as it was before, but for the projector and the vision tower, which trained without LoRA."""
    base = load_base(run_dir, trained.model.dtype)
    base.model.model.language_model.set_attn_implementation("sdpa")
    if run_config(run_dir).trainable.vision_tower:
        part_module(base.model, "vision_tower").load_state_dict(part_module(trained.model, "vision_tower").state_dict())
    return Llava(base.model.eval(), trained.processor, trained.n_image_tokens)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well, and is gone when not."""
    try:
        with folder_written_aside(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {out}: {error}") from error


def _write(llava: Llava, folder: Path) -> None:
    n_bytes = sum(parameter.nbytes for parameter in llava.model.parameters())
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ExportError(f"the model takes {n_bytes / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB left")
    write_model(llava.model, llava.processor, Prompts(llava).end_ids[0], folder)


def _add_adapter(
    adapter: Path,
    folder: Path,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    trained: _Trial,
    dtypes: set[torch.dtype],
) -> float:
    """Copies an adapter, puts it on what was written, and compares. The projector beside it is in the model already."""
    shutil.copytree(adapter, folder / ADAPTER_FOLDER, ignore=shutil.ignore_patterns(PROJECTOR_FILE, "README.md"))
    share(folder / ADAPTER_FOLDER)
    adapted = PeftModel.from_pretrained(model, str(folder), subfolder=ADAPTER_FOLDER).eval()
    tolerance = _MERGED if dtypes == {torch.float32} else _MERGED_IN_16_BITS
    return _compare(trained, _try(adapted, processor), tolerance)


def _load_plainly(folder: Path, stored: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        str(folder), dtype=pick_dtype("auto", stored, _CPU), output_loading_info=True
    )
    if wrong := {what: keys for what, keys in loading.items() if keys}:
        raise ExportError(f"transformers does not load what was written as it is ({wrong}); please report this")
    return model.eval(), AutoProcessor.from_pretrained(str(folder))


@torch.no_grad()
def _try(model: Any, processor: LlavaProcessor, as_users_do: bool = False) -> _Trial:
    """Asks a model about a picture, on the CPU, in float32 where the CPU is slow in the model's dtype.

    Args:
        as_users_do: let processor and tokenizer do what they do by themselves.
    """
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    template = portable(processor.chat_template, processor)
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True
    )
    bos = processor.tokenizer.bos_token
    adds = as_users_do or bos is None or not text.startswith(bos)
    columns = np.linspace(0, 255, 3 * 40 * 60).astype(np.uint8).reshape(40, 60, 3)
    inputs = processor(text=text, images=Image.fromarray(columns), return_tensors="pt", add_special_tokens=adds)
    stored, computing = model.dtype, pick_dtype("auto", model.dtype, _CPU)
    cast_parameters(model, computing)
    pixel_values = inputs.pixel_values.to(computing)
    logits = model(input_ids=inputs.input_ids, pixel_values=pixel_values, use_cache=False).logits[0]
    cast_parameters(model, stored)
    return _Trial(inputs.input_ids, inputs.pixel_values, logits.float(), stored)


def _refuse_overflow(trial: _Trial) -> None:
    if not trial.logits.isfinite().all():
        raise ExportError(f"the logits are not finite in {trial.dtype}; choose --dtype bf16 or fp32")


def _compare(expected: _Trial, found: _Trial, tolerance: float) -> float:
    """The largest difference of two trials' logits. Raises ExportError where it is too large."""
    if not torch.equal(expected.input_ids, found.input_ids):
        raise ExportError("the processor that was written makes other tokens of a prompt; please report this")
    if not torch.allclose(expected.pixel_values, found.pixel_values, atol=1e-5):
        raise ExportError("the processor that was written makes other pixels of a picture; please report this")
    difference, largest = _difference(expected, found), float(expected.logits.abs().max())
    if not difference <= tolerance * largest:
        raise ExportError(
            f"what was written computes other logits: they differ by up to {difference:.3g}, the largest is "
            f"{largest:.3g}; please report this"
        )
    return difference


def _difference(one: _Trial, other: _Trial) -> float:
    return float((one.logits - other.logits).abs().max())
