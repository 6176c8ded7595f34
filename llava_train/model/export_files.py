"""The files of an exported model, in the names that transformers 4 and 5, vLLM, SGLang and lmms-eval read.

    *.safetensors               the key names of the llava-hf models
    config.json                 as transformers 5 writes it, and what transformers 4 reads in other places
    generation_config.json      stops at the end of a turn and where the language model itself stops
    processor_config.json       transformers 5: processor and image processor in one file
    preprocessor_config.json    transformers 4: the image processor
    chat_template.jinja, .json  takes texts and lists of parts, generation marks hidden (`template_marks`)
    tokenizer.json, tokenizer_config.json   loaded as they are by the plain fast class of either version

What vLLM, SGLang and lmms-eval read was looked up in their sources; transformers 4 and 5 are tried in tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_train.files import share
from llava_train.model.export_template import begins_with_bos, portable, reads_eos_token

_WITH_VISION_MODEL = ("clip_vision_model", "siglip_vision_model")
"""Towers whose keys have a level `vision_model.` that transformers 5 has not in memory."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

_OF_LOADING = ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token")
"""Settings of a tokenizer that say how it was loaded; tokenizer.json has the tokens that it adds."""


def write_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, end_of_turn_id: int, folder: Path
) -> None:
    """Writes a model and its processor, all but the manifest and the model card.

    Args:
        processor: with its chat template.
        end_of_turn_id: the token at which generation stops, beside the language model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = generation_config(model, processor, end_of_turn_id)
    _save_weights(model, folder)
    processor.save_pretrained(str(folder))
    _change(folder / "config.json", lambda config: _config_for_both(config, model))
    _change(folder / "generation_config.json", lambda config: config.pop("_from_model_config", None))
    _write_processor_for_both(folder, processor, end_of_turn_id)
    share(folder)


def _save_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Weights and configs, under the keys that the hub has: `save_pretrained` renames back what transformers 5 renamed.

    Of a model that was put together of parts it leaves out one level of CLIP's and SigLIP's keys; of a model that was
    loaded, that depends on where it came from. Here both are treated alike.
    """
    state, tower = model.state_dict(), "model.vision_tower."
    if model.config.vision_config.model_type in _WITH_VISION_MODEL:
        state = {name.replace(tower, f"{tower}vision_model.", 1): tensor for name, tensor in state.items()}
    model._weight_conversions = None  # of the folder that it was loaded from
    model.save_pretrained(str(folder), state_dict=state)


def generation_config(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, end_of_turn_id: int
) -> GenerationConfig:
    """The model's own, with the tokens that end an answer and pad a batch, less sampling settings it does not use."""
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [end_of_turn_id, *own, processor.tokenizer.eos_token_id]
    config.eos_token_id = list(dict.fromkeys(token for token in ends if token is not None))
    config.pad_token_id = processor.tokenizer.pad_token_id
    if not config.do_sample:
        for name in _SAMPLING:
            setattr(config, name, None)
    return config


def _config_for_both(config: dict[str, Any], model: LlavaForConditionalGeneration) -> None:
    """What transformers 4 and servers look for: the dtype's old name, the text model's class, rope's old keys.

    vLLM and SGLang find their own text model by `text_config.architectures`. Without `rope_theta` transformers 4 takes
    10000 in silence.
    """
    text_config = config["text_config"]
    text_config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config["model_type"]]]
    text_config |= _rope_of_transformers_4(text_config.get("rope_parameters") or {})
    dtype = str(model.dtype).removeprefix("torch.")
    config["torch_dtype"] = dtype
    for part in (config, text_config, config["vision_config"]):
        part["dtype"] = dtype


def _rope_of_transformers_4(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary position settings as top-level keys. Gemma 3 has them by kind of layer, others as one."""
    if "full_attention" in parameters:
        theta = parameters["full_attention"].get("rope_theta")
        local = parameters.get("sliding_attention", {}).get("rope_theta")
        return {"rope_theta": theta, "rope_local_base_freq": local}
    old: dict[str, Any] = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in old}
    return {**old, "rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else old


def _write_processor_for_both(folder: Path, processor: LlavaProcessor, end_of_turn_id: int) -> None:
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    image_settings = {**settings["image_processor"], "processor_class": settings["processor_class"]}
    _write(folder / "preprocessor_config.json", image_settings)
    _change(folder / "tokenizer_config.json", lambda config: _tokenizer_for_both(config, processor, end_of_turn_id))
    if processor.chat_template is None:
        return
    template = portable(processor.chat_template, processor)
    end = _end_token(processor, end_of_turn_id)
    if end is not None and reads_eos_token(processor):
        template = f"{{%- set eos_token = {json.dumps(processor.tokenizer.eos_token)} -%}}\n{template}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write(folder / "chat_template.json", {"chat_template": template})
    if begins_with_bos(processor):
        _change(folder / "tokenizer.json", lambda content: _without_bos(content, processor.tokenizer.bos_token))


def _tokenizer_for_both(config: dict[str, Any], processor: LlavaProcessor, end_of_turn_id: int) -> None:
    """Settings of the tokenizer that neither version reads in its own way.

    lmms-eval stops at the tokenizer's end-of-sequence token, whatever the generation config says: so that is the
    end of turn, wherever it is a token for itself. Answers in batches need padding on the left.
    """
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["padding_side"] = "left"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # else transformers 4 makes token_type_ids, too
    for key in _OF_LOADING:
        config.pop(key, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["eos_token"] = _end_token(processor, end_of_turn_id) or config.get("eos_token")


def _end_token(processor: LlavaProcessor, end_of_turn_id: int) -> str | None:
    """The token that ends a turn, where it is one for itself and another than the end of a sequence."""
    tokenizer = processor.tokenizer
    token = tokenizer.added_tokens_decoder.get(end_of_turn_id)
    is_other = token is not None and token.special and token.content != tokenizer.eos_token
    return str(token.content) if token is not None and is_other else None


def _without_bos(content: dict[str, Any], bos: str) -> None:
    """Takes the begin-of-sequence token out of what a tokenizer adds to a text."""
    processors = content.get("post_processor") or {}
    for step in processors.get("processors", [processors]):
        for key in ("single", "pair"):
            if step.get("type") == "TemplateProcessing":
                step[key] = [piece for piece in step[key] if piece.get("SpecialToken", {}).get("id") != bos]


def _change(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Reads a JSON file, changes it in place and writes it; a tokenizer's vocabulary keeps its order."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    _write(path, content, sort_keys=path.name != "tokenizer.json")


def _write(path: Path, content: dict[str, Any], sort_keys: bool = True) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
