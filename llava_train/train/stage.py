"""`run_stage`: the story of a stage, from its file to its result."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

from llava_train.config import StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template, unlike_own
from llava_train.data.images import ImagePreprocessor
from llava_train.data.loader import StepDataset, first_pictures, read_steps
from llava_train.data.mixture import Mixture, open_mixture
from llava_train.data.order import n_steps_of
from llava_train.data.packing import attention_cost_of
from llava_train.devices import DTYPES, imitates_bf16
from llava_train.errors import UserError
from llava_train.files import damage, write_manifest
from llava_train.model.build import Llava, build_llava
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.quantize import check_quantization, is_quantized, quantize_base, round_like_nf4
from llava_train.model.recompute import Recompute, enable_recompute
from llava_train.model.standardize import feature_statistics, fold, standardize
from llava_train.model.trainable import parameter_groups, set_trainable, summarize
from llava_train.model.weights import (
    RESULT_FOLDER,
    State,
    check_init,
    export_model,
    is_whole_model,
    load_init,
    save_projector,
)
from llava_train.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from llava_train.train.device_peaks import peak_flops_of
from llava_train.train.dry_run import dry_run
from llava_train.train.engine import gathered, start_engine, stop_engine, time_reduction
from llava_train.train.evaluate import evaluate, open_held_out
from llava_train.train.heaviest import most_images
from llava_train.train.interrupt import STOP_FILE
from llava_train.train.loop import Loop
from llava_train.train.memory import Estimator, budget_of
from llava_train.train.metrics import Yardstick, model_flops
from llava_train.train.out_of_memory import advised
from llava_train.train.precompute import cached_features
from llava_train.train.resume import Resumption, find_resumption, load
from llava_train.train.run_folder import check_unchanged, config_hash, describe, held, write_card
from llava_train.train.session import Session
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.tracking import Tracker
from llava_train.train.window import Window
from llava_train.train.world import World

_STATISTICS_PICTURES, _STATISTICS_STEPS = 64, 16
"""How many pictures decide the mean and deviation of the features, and in how many steps they are looked for."""
_START_PATIENCE = 6.0
"""How many times `engine.hang_timeout_s` a part of the start may take: downloads and large models do."""


def run_stage(config: StageConfig, session: Session) -> Path:
    """Trains a stage from wherever it stands to its end; returns the folder of its result.

    A finished stage is passed over. Every rank of the run must call it.

    Raises:
        DataError, BuildError, HandOffError, BadSampleError: what the user gave cannot be used.
        RunFolderError: another process works in the run's folder, or the folder is another run's.
        FeatureError: the features of its pictures cannot be kept.
        CheckpointError: its newest checkpoint cannot be continued.
        BadNumbersError, HarmedError: the loss, the gradient or the weights are not finite.
        OutOfMemory: the stage does not fit a device.
        Preempted: somebody asked to stop; the run is saved.
    """
    world, result = session.world, config.run_dir / RESULT_FOLDER
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism
    with ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(held(config.run_dir, config.cache_dir / f"{config.name}.lock")))
        if world.on_main(lambda: damage(result) is None):
            card, allowed = describe(config), session.allow_config_change
            world.on_main(lambda: check_unchanged(config.run_dir, card, None, allowed))
            world.say(f"{config.name}: complete, see {result}")
            return result
        world.say(f"{config.name}: run folder {config.run_dir}")
        stop_file = config.run_dir / STOP_FILE
        session.stop.stop_files.append(stop_file)
        trained = _train(config, session)
        world.beat("writing the result", patience=_START_PATIENCE)
        world.on_main(lambda: _write_result(config, trained, result))
        world.on_main(lambda: stop_file.unlink(missing_ok=True))  # asked too late, it shall not stop the next run
    world.say(f"{config.name}: finished, result in {result}")
    return result


def _train(config: StageConfig, session: Session) -> State:
    """Trains the stage; returns the trained parameters by name, on rank 0."""
    world, clock = session.world, session.clock
    clock.start()
    world.beat("opening the data", patience=_START_PATIENCE)
    mixture = open_mixture(config.data, config.seed, config.cache_dir)
    held_out = open_mixture(config.eval.data, config.seed, config.cache_dir) if config.eval else None
    n_steps = n_steps_of(len(mixture), config.batch.size, config.schedule.epochs, config.schedule.max_steps)
    card = describe(config, mixture)
    resumption, changes = _find_resumption(config, session, card)
    clock.mark("data")

    llava, came_from, new_dataset = _build(config, world, mixture)
    estimator = Estimator(llava.model.config, world.n_ranks, world.device.type, most_images(mixture))
    budget = _budget(world, llava)
    choice = world.on_main(lambda: estimator.choose(config, budget))
    _prepare_modes(llava, config, choice.recompute)
    use_kernels(llava.model, config.engine.kernels, world.device, config.engine.zero)
    parts, yardstick = list(summarize(llava.model, config.trainable)), _yardstick(config, world, llava)
    clock.mark("model")
    world.on_main(lambda: write_card(config.run_dir, card, world.n_ranks, resumption.step, bool(changes)))
    world.say(f"{config.name}: {len(mixture):,} samples, {n_steps:,} steps, {world.n_ranks} ranks, {came_from}")
    _say_notes(config, world, llava)
    if choice.estimate:
        world.say(choice.line)
    steps, features = range(resumption.step, n_steps), None
    if config.loader.cache_features:
        features = cached_features(config, session, llava, new_dataset(mixture, seed=config.seed), steps)
        clock.mark("features")
    engine, checkpoints = _start_engine(config, session, llava, resumption, config_hash(card))

    with Tracker(config, world, resumption.step, n_steps) as tracker:
        tracker.started(parts, resumption.step, resumption.passed_over)
        names, watch = tuple(source.name for source in mixture.sources), Stopwatch(world.device)
        window = Window(names, tracker.n_bad_before, yardstick, watch)
        time_reduction(engine, watch)
        if resumption.checkpoint:
            window.restore(resumption.manifest["window"], world)
        dataset = new_dataset(mixture, seed=config.seed, features=features)
        evaluate_after = _evaluation(config, world, engine, llava, new_dataset, held_out, n_steps, tracker)
        loop = Loop(session, config, engine, n_steps, tracker, window, checkpoints, evaluate_after)
        on_cuda = world.device.type == "cuda"
        with (
            advised(world, estimator, config, choice.recompute, budget),
            closing(read_steps(dataset, steps, config.loader.workers, on_cuda)) as batches,
        ):
            if on_cuda and steps:
                dry_run(engine, world, estimator.pack(config))
            loop.train(batches)
        world.beat("gathering the result", patience=_START_PATIENCE)
        checkpoints.refuse_harmed(n_steps)
        trained = gathered(engine, world, llava.model)
        trained = fold(llava.model, trained) if world.is_main else trained
    stop_engine(engine)
    return trained


def _build(config: StageConfig, world: World, mixture: Mixture) -> tuple[Llava, str, Callable[..., StepDataset]]:
    """The model, ready to train; where its trained parts came from; and what makes data sets of mixtures for it."""
    world.beat("building the model", patience=_START_PATIENCE)
    check_quantization(config.trainable)
    if config.init_from not in (None, "random"):
        check_init(str(config.init_from), config.output)
    llava, came_from = _starting_point(config)
    if is_quantized(config.trainable):
        quantize_base(llava.model, world.device)
    set_trainable(llava.model, config.trainable, config.seed)
    new_dataset = _dataset_maker(config, world, llava)
    if config.trainable.projector and config.trainable.projector.standardize:
        _standardize_features(config, world, llava, new_dataset(mixture, seed=config.seed, rank=0, n_ranks=1))
    return llava, came_from, new_dataset


def _budget(world: World, llava: Llava) -> int:
    """Bytes that a step may take on the device of each rank: of all devices the smallest. Every rank must call it."""
    host = socket.gethostname()
    loaded = sum(parameter.nbytes for parameter in llava.model.parameters())
    return min(world.gather(budget_of(world.device, world.gather(host).count(host), loaded)))


def _yardstick(config: StageConfig, world: World, llava: Llava) -> Yardstick:
    """What the run's speed is measured by. Call it before DeepSpeed partitions the parameters."""
    flops = model_flops(llava.model, llava.n_image_tokens, config.loader.cache_features)
    peak = peak_flops_of(world.device, config.engine.precision)
    return Yardstick(flops, peak, llava.n_image_tokens, llava.model.config.image_token_id)


def _say_notes(config: StageConfig, world: World, llava: Llava) -> None:
    """What a user may not have meant."""
    if note := unlike_own(config.model.chat_template, llava.processor.chat_template, llava.tokenizer):
        world.say(note)
    if config.engine.precision == "bf16" and imitates_bf16(world.device):
        world.say("engine.precision: this CPU imitates bf16, tens of times slower than fp32; better set it to fp32")


def _start_engine(
    config: StageConfig, session: Session, llava: Llava, resumption: Resumption, hash_: str
) -> tuple[deepspeed.DeepSpeedEngine, Checkpoints]:
    """DeepSpeed, in the state of the checkpoint that the run goes on from, and the run's checkpoints."""
    world, clock = session.world, session.clock
    world.beat("starting DeepSpeed", patience=_START_PATIENCE)
    groups = parameter_groups(llava.model, config.trainable, config.schedule.weight_decay)
    changed = resumption.conversion(world.n_ranks, config.engine.zero)
    engine = start_engine(PackedLoss(llava.model), groups, config, universal=changed is not None)
    clock.mark("engine")
    engine_facts = {key: getattr(config.engine, key) for key in ("zero", "precision")}
    facts = {"n_ranks": world.n_ranks, **engine_facts, "config_hash": hash_}
    checkpoints = Checkpoints(engine, world, config.run_dir / CHECKPOINTS_FOLDER, config.checkpoint.keep, facts)
    if resumption.checkpoint:
        if changed:
            world.say(f"{resumption.checkpoint}: {changed}; converting it with DeepSpeed's universal format")
        world.beat("loading the checkpoint", patience=_START_PATIENCE)
        load(engine, world, resumption)
        checkpoints.go_on_from(resumption.step)
        clock.mark("checkpoint")
    return engine, checkpoints


def _evaluation(
    config: StageConfig,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    llava: Llava,
    new_dataset: Callable[..., StepDataset],
    held_out: Mixture | None,
    n_steps: int,
    tracker: Tracker,
) -> Callable[[int], None]:
    """What evaluates after a step, where the stage file says so."""
    section = config.eval
    if section is None or held_out is None:
        return lambda step: None
    dataset = new_dataset(held_out, seed=None, batch_size=min(config.batch.size, section.max_samples))
    asked = open_held_out(world, dataset, section)

    def evaluate_after(step: int) -> None:
        if step % section.every == 0 or step == n_steps:
            tracker.evaluation(step, evaluate(engine, world, llava, asked, config))

    return evaluate_after


def _find_resumption(config: StageConfig, session: Session, card: dict[str, Any]) -> tuple[Resumption, list[str]]:
    """Where the run goes on, and what has changed since. Every rank must call it."""
    world, run_dir, allowed = session.world, config.run_dir, session.allow_config_change
    found = find_resumption(world, run_dir / CHECKPOINTS_FOLDER, config.engine)
    if found.checkpoint is None:
        return found, []
    changes = world.on_main(lambda: check_unchanged(run_dir, card, found.manifest["config_hash"], allowed))
    for change in changes:
        world.say(f"{config.name}: changed after step {found.step}: {change}")
    return found, changes


def _starting_point(config: StageConfig) -> tuple[Llava, str]:
    """The model before this stage, and a line that says where its trained parts came from."""
    llava = build_llava(config.model, config.image, DTYPES[config.engine.precision], config.seed)
    llava.processor.chat_template = load_template(config.model.chat_template, llava.tokenizer)
    if config.init_from in (None, "random"):
        return llava, "starting from a new projector"
    return llava, "starting from " + load_init(str(config.init_from), llava.model, config.model)


def _encoder(config: StageConfig, llava: Llava) -> ChatEncoder:
    return ChatEncoder(
        llava.tokenizer,
        llava.processor.chat_template,
        llava.n_image_tokens,
        config.batch.max_sample_tokens,
        config.batch.over_long,
    )


def _dataset_maker(config: StageConfig, world: World, llava: Llava) -> Callable[..., StepDataset]:
    """`make(mixture, seed=...)` gives the steps of this rank over a mixture."""
    return partial(
        StepDataset,
        encoder=_encoder(config, llava),
        preprocessor=ImagePreprocessor(llava.processor.image_processor),
        batch_size=config.batch.size,
        max_tokens=config.batch.max_tokens,
        rank=world.rank,
        n_ranks=world.n_ranks,
        packing=config.batch.packing,
        attention_cost=attention_cost_of(llava.model.config.text_config.hidden_size),
    )


def _standardize_features(config: StageConfig, world: World, llava: Llava, dataset: StepDataset) -> None:
    """Standardizes what enters the projector, by the first pictures that the run trains on. Raises UserError."""
    pictures = first_pictures(dataset, _STATISTICS_PICTURES, _STATISTICS_STEPS)
    if not pictures:
        raise UserError(
            f"trainable.projector.standardize: the samples of the first {_STATISTICS_STEPS} steps hold no readable "
            "picture to find the features' mean by; set it to false or mend the data"
        )
    mean, deviation = feature_statistics(llava.model, pictures, world.device)
    for tensor in (mean, deviation):
        torch.distributed.broadcast(tensor, src=0)
    standardize(llava.model, mean, deviation, is_new=config.init_from in (None, "random"))


def _prepare_modes(llava: Llava, config: StageConfig, recompute: Recompute) -> None:
    """Training mode for what trains or is checkpointed; frozen encoders stay in evaluation mode."""
    llava.model.train()
    language_model, vision_tower = llava.model.model.language_model, llava.model.model.vision_tower
    vision_tower.train(config.trainable.vision_tower is not None)
    for module in [language_model] + ([vision_tower] if config.trainable.vision_tower else []):
        enable_recompute(module, recompute)


def _write_result(config: StageConfig, trained: State, folder: Path) -> None:
    """Writes what the stage leaves: its starting point, built anew, with the trained parameters."""
    llava, _ = _starting_point(config)
    if is_quantized(config.trainable):
        round_like_nf4(llava.model)
    peft_model = set_trainable(llava.model, config.trainable, config.seed)
    unexpected = llava.model.load_state_dict(trained, strict=False).unexpected_keys
    assert not unexpected, f"trained parameters without a place: {unexpected}"
    from_parts = config.init_from in (None, "random") or not is_whole_model(str(config.init_from))
    if from_parts and config.trainable.learning_rates().keys() == {"projector"}:
        save_projector(llava.model, config.model, folder)
    else:
        end_of_turn_id = _encoder(config, llava).end_of_turn_id()
        export_model(llava.model, llava.processor, end_of_turn_id, folder, peft_model)
    write_manifest(folder, name=config.name)
