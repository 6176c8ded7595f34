"""The model of a stage: put together, made ready to train, and written as the stage's result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from llava_train.config import StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor
from llava_train.data.loader import StepDataset, first_pictures
from llava_train.data.mixture import Mixture
from llava_train.data.packing import attention_cost_of
from llava_train.devices import DTYPES, without_bf16_attention
from llava_train.errors import UserError
from llava_train.files import write_manifest
from llava_train.model.build import Llava, build_llava
from llava_train.model.kernels import check_kernels
from llava_train.model.quantize import check_quantization, is_quantized, quantize_base, round_like_nf4
from llava_train.model.recompute import Recompute, enable_recompute
from llava_train.model.standardize import feature_statistics, standardize
from llava_train.model.trainable import set_trainable
from llava_train.model.weights import (
    State,
    export_model,
    is_whole_model,
    load_init,
    save_projector,
)
from llava_train.onednn import compiles_each_shape
from llava_train.train.world import World

_STATISTICS_PICTURES, _STATISTICS_STEPS = 64, 16
"""How many pictures decide the mean and deviation of the features, and in how many steps they are looked for."""
START_PATIENCE = 6.0
"""How many times `engine.hang_timeout_s` a part of the start may take: downloads and large models do."""


def check_devices(config: StageConfig, world: World) -> None:
    """Refuses a precision that the GPU of some rank cannot train in. Every rank must call it. Raises UserError."""
    if config.engine.precision != "bf16":
        return
    if old := [gpu for gpu in world.gather(without_bf16_attention(world.device)) if gpu]:
        remedy = "set it to fp32"
        if is_quantized(config.trainable):
            remedy += ", and remove trainable.language_model.lora.quantize_base, which needs bf16"
        raise UserError(
            "engine.precision: bf16 needs a GPU of compute capability 8.0 (Ampere: A100, RTX 30) or newer, and here is "
            f"{old[0]}; {remedy}, or train on a newer GPU"
        )


def build(config: StageConfig, world: World, mixture: Mixture) -> tuple[Llava, str, Callable[..., StepDataset]]:
    """The model, ready to train; where its trained parts came from; and what makes data sets of mixtures for it."""
    world.beat("building the model", patience=START_PATIENCE)
    check_quantization(config.trainable)
    check_kernels(config.engine.kernels, world.device)
    llava, came_from = starting_point(config)
    if is_quantized(config.trainable):
        quantize_base(llava.model, world.device)
    set_trainable(llava.model, config.trainable, config.seed)
    new_dataset = dataset_maker(config, world, llava)
    if config.trainable.projector and config.trainable.projector.standardize:
        _standardize_features(config, world, llava, new_dataset(mixture, seed=config.seed, rank=0, n_ranks=1))
    return llava, came_from, new_dataset


def starting_point(config: StageConfig) -> tuple[Llava, str]:
    """The model before this stage, and a line that says where its trained parts came from."""
    llava = build_llava(config.model, config.image, DTYPES[config.engine.precision], config.seed)
    llava.processor.chat_template = load_template(config.model.chat_template, llava.tokenizer)
    if config.start is None:
        return llava, "a new projector"
    return llava, load_init(config.start, llava.model, config.model)


def chat_encoder(config: StageConfig, llava: Llava) -> ChatEncoder:
    return ChatEncoder(
        llava.tokenizer,
        llava.processor.chat_template,
        llava.n_image_tokens,
        config.batch.max_sample_tokens,
        config.batch.over_long,
    )


def dataset_maker(config: StageConfig, world: World, llava: Llava) -> Callable[..., StepDataset]:
    """`make(mixture, seed=...)` gives the steps of this rank over a mixture."""
    return partial(
        StepDataset,
        encoder=chat_encoder(config, llava),
        preprocessor=ImagePreprocessor(llava.processor.image_processor),
        batch_size=config.batch.size,
        max_tokens=config.batch.max_tokens,
        rank=world.rank,
        n_ranks=world.n_ranks,
        packing=config.batch.packing,
        attention_cost=attention_cost_of(llava.model.config.text_config.hidden_size),
        few_sizes=compiles_each_shape(world.device, DTYPES[config.engine.precision]),
    )


def _standardize_features(config: StageConfig, world: World, llava: Llava, dataset: StepDataset) -> None:
    """Standardizes what enters the projector, by the first pictures that the run trains on. Raises UserError."""
    pictures = first_pictures(dataset, _STATISTICS_PICTURES, _STATISTICS_STEPS)
    if not pictures:
        bad = next((bad for step in range(_STATISTICS_STEPS) for bad in dataset[step].bad_samples), None)
        why = f" {bad.source}: {bad.id!r} ({bad.place}): {bad.reason}." if bad else ""
        raise UserError(
            f"trainable.projector.standardize: the first {_STATISTICS_STEPS} steps have no sample with a picture that "
            f"can be trained on, to find the features' mean by.{why} `llava-train check` lists what is wrong with the "
            "data"
        )
    mean, deviation = feature_statistics(llava.model, pictures, world.device)
    for tensor in (mean, deviation):
        torch.distributed.broadcast(tensor, src=0)
    standardize(llava.model, mean, deviation, is_new=config.start is None)


def prepare_modes(llava: Llava, config: StageConfig, recompute: Recompute) -> None:
    """Training mode for what trains or is checkpointed; frozen encoders stay in evaluation mode."""
    llava.model.train()
    language_model, vision_tower = llava.model.model.language_model, llava.model.model.vision_tower
    vision_tower.train(config.trainable.vision_tower is not None)
    for module in [language_model] + ([vision_tower] if config.trainable.vision_tower else []):
        enable_recompute(module, recompute)


def write_result(config: StageConfig, trained: State, folder: Path) -> None:
    """Writes what the stage leaves: its starting point, built anew, with the trained parameters."""
    llava, _ = starting_point(config)
    if is_quantized(config.trainable):
        round_like_nf4(llava.model)
    peft_model = set_trainable(llava.model, config.trainable, config.seed)
    unexpected = llava.model.load_state_dict(trained, strict=False).unexpected_keys
    assert not unexpected, f"trained parameters without a place: {unexpected}"
    from_parts = config.start is None or not is_whole_model(config.start)
    if from_parts and config.trainable.learning_rates().keys() == {"projector"}:
        save_projector(llava.model, config.model, folder)
    else:
        end_of_turn_id = chat_encoder(config, llava).end_of_turn_id()
        export_model(llava.model, llava.processor, end_of_turn_id, folder, peft_model)
    write_manifest(folder, name=config.name)
