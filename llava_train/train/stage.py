"""`run_stage`: the story of a stage, from its file to its result."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed

from llava_train.config import StageConfig
from llava_train.data.chat_templates import unlike_own
from llava_train.data.lengths import Longest, measure_longest
from llava_train.data.loader import StepDataset, read_steps
from llava_train.data.mixture import Mixture, open_mixture
from llava_train.data.order import n_steps_of
from llava_train.data.survey import Survey, refuse_without_pictures, survey, warnings_of
from llava_train.devices import imitates_bf16
from llava_train.files import damage
from llava_train.model.build import Llava
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.standardize import fold
from llava_train.model.trainable import parameter_groups, summarize
from llava_train.model.weights import State, check_init
from llava_train.report.page import report_after_run
from llava_train.run_files import RESULT_FOLDER
from llava_train.train.assembly import (
    START_PATIENCE,
    build,
    chat_encoder,
    check_devices,
    prepare_modes,
    write_result,
)
from llava_train.train.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from llava_train.train.console import show_overview, show_rows
from llava_train.train.device_peaks import peak_flops_of
from llava_train.train.dry_run import dry_run
from llava_train.train.engine import free_memory, gathered, start_engine, stop_engine, time_reduction
from llava_train.train.evaluate import evaluate, open_held_out
from llava_train.train.finished import written
from llava_train.train.heaviest import PackShape
from llava_train.train.interrupt import STOP_FILE
from llava_train.train.loop import Loop
from llava_train.train.memory import Estimator, budget_of
from llava_train.train.metrics import Yardstick, model_flops
from llava_train.train.out_of_memory import advised, noted
from llava_train.train.overview import Overview
from llava_train.train.pace import expected_step_s
from llava_train.train.precompute import cached_features
from llava_train.train.resume import Resumption, find_resumption, load
from llava_train.train.run_folder import (
    RunFolderError,
    check_finished,
    check_unchanged,
    config_hash,
    describe,
    held,
    write_card,
)
from llava_train.train.session import Session
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.tracking import Tracking
from llava_train.train.window import Window
from llava_train.train.world import World

_SMALLER_EVALUATION = "a lower eval.max_new_tokens; or eval.generate: 0 and no eval.metric, so that none is generated"


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
            world.on_main(lambda: check_finished(config.run_dir, describe(config)))
            world.say(f"{config.name}: complete, see {result}")
            return result
        if config.start is not None:
            check_init(config.start, config.output)
        stop_file = config.run_dir / STOP_FILE
        session.stop.stop_files.append(stop_file)
        stack.enter_context(_reported(config, world))
        trained = _train(config, session, stack)
        free_memory()
        world.beat("writing the result", patience=START_PATIENCE)
        session.waiting.show("writing the result")
        world.on_main(lambda: write_result(config, trained, result))
        session.waiting.stop()
        world.on_main(lambda: stop_file.unlink(missing_ok=True))  # asked too late, it shall not stop the next run
    world.say(f"{config.name}: finished, result in {result}")
    if world.is_main:
        show_rows(session.waiting.console, written(config))
    world.say("")
    return result


@contextmanager
def _reported(config: StageConfig, world: World) -> Iterator[None]:
    """Writes the run's report in the end, however the run ends; on rank 0, after everything is saved."""
    try:
        yield
    finally:
        if world.is_main and (problem := report_after_run(config.run_dir)):
            world.say(problem)


def _train(config: StageConfig, session: Session, stack: ExitStack) -> State:
    """Trains the stage; returns the trained parameters by name, on rank 0.

    Args:
        stack: what ends with the stage.
    """
    world, clock = session.world, session.clock
    clock.start()
    check_devices(config, world)
    world.beat("opening the data", patience=START_PATIENCE)
    session.waiting.show("opening the data")
    mixture = open_mixture(config.data, config.seed, config.cache_dir)
    held_out = open_mixture(config.eval.data, config.seed, config.cache_dir) if config.eval else None
    found = world.on_main(lambda: _surveyed(config, mixture))
    n_steps = n_steps_of(len(mixture), config.batch.size, config.schedule.epochs, config.schedule.max_steps)
    card = describe(config, mixture)
    resumption, changes = _find_resumption(config, session, card)
    _refuse_fewer_steps(config, resumption.step, n_steps)
    clock.mark("data")

    session.waiting.show("building the model")
    llava, came_from, new_dataset = build(config, world, mixture)
    clock.mark("model")
    longest = _longest(config, session, llava, mixture)
    clock.mark("lengths")
    estimator = Estimator(llava.model.config, world.n_ranks, world.device.type, longest)
    budget = _budget(world, llava)
    choice = world.on_main(lambda: estimator.choose(config, budget))
    stack.enter_context(advised(world, choice))  # from here on the device fills
    prepare_modes(llava, config, choice.recompute)
    use_kernels(llava.model, config.engine.kernels, world.device, config.engine.zero)
    parts, yardstick = tuple(summarize(llava.model, config.trainable)), _yardstick(config, world, llava)
    clock.mark("model")
    write_the_card = partial(write_card, config.run_dir, card, world.n_ranks, resumption.step, bool(changes))
    if not changes:
        world.on_main(write_the_card)
    dataset = new_dataset(mixture, seed=config.seed)
    if world.is_main:
        pace, pack = expected_step_s(dataset, yardstick), estimator.pack(config)
        known = (mixture, held_out, n_steps, world.n_ranks, world.device, pack, choice.line, pace, resumption)
        world.say(f"{config.name}: run folder {config.run_dir}")
        show_overview(session.waiting.console, Overview(config, parts, came_from, *known))
    _say_notes(config, world, llava, found, is_new=resumption.checkpoint is None)
    steps, features = range(resumption.step, n_steps), None
    if config.loader.cache_features:
        session.waiting.show("computing features")
        with noted("computing features", mend="--set loader.cache_features=false"):
            features = cached_features(config, session, llava, dataset, steps)
        clock.mark("features")
    session.waiting.show("starting DeepSpeed")
    engine, checkpoints = _start_engine(config, session, llava, resumption, config_hash(card))
    if changes:  # not before the checkpoint is loaded: a change that does not fit it is not the run's
        world.on_main(write_the_card)
    session.waiting.stop()

    with Tracking(config, world, resumption.step, n_steps) as tracking:
        names, watch = tuple(source.name for source in mixture.sources), Stopwatch(world.device)
        window = Window(names, tracking.n_bad_before, yardstick, watch)
        time_reduction(engine, watch)
        if resumption.checkpoint:
            window.restore(resumption.manifest["window"], world)
        dataset = new_dataset(mixture, seed=config.seed, features=features)
        evaluate_after = _evaluation(
            config, world, engine, llava, new_dataset, held_out, estimator.pack(config), n_steps, tracking
        )
        loop = Loop(session, config, engine, n_steps, tracking, window, checkpoints, evaluate_after)
        on_cuda = world.device.type == "cuda"
        with closing(read_steps(dataset, steps, config.loader.workers, on_cuda)) as batches:
            if on_cuda and steps:
                dry_run(engine, world, estimator.pack(config), features)
                clock.mark("dry run")
            if config.eval and not resumption.step:
                tracking.say("evaluating before the first step")
                evaluate_after(0)
                clock.mark("evaluation")
            loop.train(batches)
        world.beat("gathering the result", patience=START_PATIENCE)
        checkpoints.refuse_harmed(n_steps)
        with noted("gathering the result"):
            trained = gathered(engine, world, llava.model)
        trained = fold(llava.model, trained) if world.is_main else trained
    stop_engine(engine)
    return trained


def _refuse_fewer_steps(config: StageConfig, n_taken: int, n_steps: int) -> None:
    """Raise RunFolderError where the run has taken more steps than the stage file asks for now."""
    if n_taken > n_steps:
        raise RunFolderError(
            f"{config.run_dir} has taken {n_taken:,} steps, and the stage file now asks for {n_steps:,}; ask for more "
            "(schedule.epochs, schedule.max_steps), or give the run another name"
        )


def _longest(config: StageConfig, session: Session, llava: Llava, mixture: Mixture) -> Longest | None:
    """The greatest samples of the run, where they are few enough to measure all. Every rank must call it."""
    session.world.beat("measuring the samples", patience=START_PATIENCE)
    session.waiting.show("measuring the samples")
    encoder = chat_encoder(config, llava)
    return session.world.on_main(lambda: measure_longest(config, mixture, encoder))


def _budget(world: World, llava: Llava) -> int:
    """Bytes that a step may take on the device of each rank: of all devices the smallest. Every rank must call it."""
    host = socket.gethostname()
    loaded = sum(parameter.nbytes for parameter in llava.model.parameters())
    return min(world.gather(budget_of(world.device, world.gather(host).count(host), loaded)))


def _yardstick(config: StageConfig, world: World, llava: Llava) -> Yardstick:
    """What the run's steps are measured by. Call it before DeepSpeed partitions the parameters."""
    flops = model_flops(llava.model, llava.n_image_tokens, config.loader.cache_features)
    peak = peak_flops_of(world.device, config.engine.precision)
    limits = config.batch.max_sample_tokens, config.batch.max_tokens
    return Yardstick(flops, peak, llava.n_image_tokens, llava.model.config.image_token_id, *limits)


def _surveyed(config: StageConfig, mixture: Mixture) -> Survey:
    """A survey of the data. Raises DataError where the stage needs pictures and finds none."""
    found = survey(mixture)
    refuse_without_pictures(found, set(config.trainable.learning_rates()))
    return found


def _say_notes(config: StageConfig, world: World, llava: Llava, found: Survey, is_new: bool) -> None:
    """Says what a user may not have meant; about the chat template only when a run begins."""
    for warning in warnings_of(found, set(config.trainable.learning_rates())):
        world.say(warning)
    template, tokenizer = llava.processor.chat_template, llava.tokenizer
    if is_new and (note := world.on_main(lambda: unlike_own(config.model.chat_template, template, tokenizer))):
        world.say(note)
    if config.engine.precision == "bf16" and imitates_bf16(world.device):
        world.say("engine.precision: this CPU imitates bf16, tens of times slower than fp32; better set it to fp32")


def _start_engine(
    config: StageConfig, session: Session, llava: Llava, resumption: Resumption, hash_: str
) -> tuple[deepspeed.DeepSpeedEngine, Checkpoints]:
    """DeepSpeed, in the state of the checkpoint that the run goes on from, and the run's checkpoints."""
    world, clock = session.world, session.clock
    world.beat("starting DeepSpeed", patience=START_PATIENCE)
    groups = parameter_groups(llava.model, config.trainable, config.schedule.weight_decay)
    changed = resumption.conversion(world.n_ranks, config.engine.zero)
    with noted("starting DeepSpeed"):
        engine = start_engine(PackedLoss(llava.model), groups, config, universal=changed is not None)
    clock.mark("engine")
    engine_facts = {key: getattr(config.engine, key) for key in ("zero", "precision")}
    facts = {"n_ranks": world.n_ranks, **engine_facts, "config_hash": hash_}
    checkpoints = Checkpoints(engine, world, config.run_dir / CHECKPOINTS_FOLDER, config.checkpoint.keep, facts)
    if resumption.checkpoint:
        if changed:
            world.say(f"{resumption.checkpoint}: {changed}; converting it with DeepSpeed's universal format")
        world.beat("loading the checkpoint", patience=START_PATIENCE)
        with noted("loading the checkpoint"):
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
    heaviest: PackShape,
    n_steps: int,
    tracking: Tracking,
) -> Callable[[int], None]:
    """What evaluates after a step, where the stage file says so; after step 0 before the first."""
    section = config.eval
    if section is None or held_out is None:
        return lambda step: None
    # The estimate of memory is of the samples that train. Longer held-out ones make more packs, not heavier ones.
    max_tokens = min(config.batch.max_tokens, max(heaviest.n_tokens, config.batch.max_sample_tokens))
    batch_size = min(config.batch.size, section.max_samples)
    dataset = new_dataset(held_out, seed=None, batch_size=batch_size, max_tokens=max_tokens)
    asked = open_held_out(world, dataset, section, config.run_dir)

    def evaluate_after(step: int) -> None:
        if step % section.every == 0 or step == n_steps:
            with noted("evaluating", mend=_SMALLER_EVALUATION):
                found = evaluate(engine, world, llava, asked, config)
            tracking.evaluation(step, found)

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
