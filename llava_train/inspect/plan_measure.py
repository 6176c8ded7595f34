"""The speed of a stage on this machine, measured in a few of its own steps.

They read the stage's data and train its parts on one device, at a learning rate of 0 and with a new projector, whatever
`init_from` says; no run is written. The first step does not count: in it libraries choose and compile what they run.
"""

from __future__ import annotations

import time
from contextlib import closing

import torch

from llava_train.config import StageConfig
from llava_train.data.lengths import measure_longest
from llava_train.data.loader import StepDataset, read_steps
from llava_train.data.mixture import open_mixture
from llava_train.inspect.plan import Speed
from llava_train.inspect.plan_lengths import PlanError
from llava_train.model.build import Llava
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups
from llava_train.train.assembly import build, chat_encoder, prepare_modes
from llava_train.train.engine import start_engine, stop_engine
from llava_train.train.loop import set_learning_rate, train_step
from llava_train.train.memory import Estimator, budget_of
from llava_train.train.metrics import PackWork, Yardstick, model_flops
from llava_train.train.out_of_memory import advised
from llava_train.train.pace import figure
from llava_train.train.world import World, start_distributed

N_STEPS, ENOUGH_S = 5, 60.0
"""Steps that are timed, and the seconds after which those so far are enough."""


def measure_speed(config: StageConfig, n_ranks: int) -> Speed:
    """Trains a few steps of a stage in this process, to no effect.

    Args:
        n_ranks: that the plan is for.

    Raises UserError.
    """
    world = start_distributed()
    try:
        if world.n_ranks > 1:
            raise PlanError("--measure: start it as one process, without torchrun, deepspeed or srun")
        return _measured(_alone(config), world, n_ranks)
    finally:
        torch.distributed.destroy_process_group()


def _alone(config: StageConfig) -> StageConfig:
    """The stage without what it needs from other runs, and without what is no training."""
    loader = config.loader.model_copy(update={"cache_features": False})
    return config.model_copy(update={"init_from": "random", "eval": None, "loader": loader})


def _measured(config: StageConfig, world: World, n_ranks: int) -> Speed:
    mixture = open_mixture(config.data, config.seed, config.cache_dir)
    llava, _, new_dataset = build(config, world, mixture)
    longest = measure_longest(config, mixture, chat_encoder(config, llava))
    loaded = sum(parameter.nbytes for parameter in llava.model.parameters())
    estimator = Estimator(llava.model.config, 1, world.device.type, longest)
    choice = estimator.choose(config, budget_of(world.device, 1, loaded))
    with advised(world, choice):
        prepare_modes(llava, config, choice.recompute)
        use_kernels(llava.model, config.engine.kernels, world.device, config.engine.zero)
        n_steps, seconds, work = _timed(config, world, llava, new_dataset(mixture, seed=config.seed))
    step_s, flops_per_s = seconds / n_steps, work.flops / seconds or None
    name = f"one {torch.cuda.get_device_name(world.device)}" if world.device.type == "cuda" else "this machine's CPU"
    rate = f"{figure(flops_per_s / 1e12)} TFLOP/s, " if flops_per_s else ""
    words = f"{figure(step_s)} s a step on {name} in {config.engine.precision} ({rate}measured over {n_steps} "
    words += "step)" if n_steps == 1 else "steps)"
    if n_ranks > 1:
        words += f"; what {n_ranks:,} of them exchange is not counted"
    return Speed(words, flops_per_s, step_s)


def _timed(config: StageConfig, world: World, llava: Llava, dataset: StepDataset) -> tuple[int, float, PackWork]:
    """Number of timed steps, their seconds, and the work in them."""
    flops, on_cuda = model_flops(llava.model, llava.n_image_tokens), world.device.type == "cuda"
    yardstick = Yardstick(flops, None, llava.n_image_tokens, llava.model.config.image_token_id)
    engine = start_engine(PackedLoss(llava.model), parameter_groups(llava.model, config.trainable, 0.0), config)
    set_learning_rate(engine, 0.0)
    n_steps, started, seconds, work = 0, 0.0, 0.0, PackWork()
    with closing(read_steps(dataset, range(1 + N_STEPS), config.loader.workers, on_cuda)) as batches:
        for batch in batches:
            train_step(engine, world, batch, batch.n_supervised)
            if on_cuda:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if batch.step:
                n_steps, seconds = batch.step, now - started
                work = sum(map(yardstick.measure, batch.micro_batches), start=work)
            else:
                started = now
            if n_steps and seconds > ENOUGH_S:
                break
    stop_engine(engine)
    return n_steps, seconds, work
