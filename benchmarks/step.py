"""Where the time of a training step goes, and what our loop adds to a bare one.

    python benchmarks/step.py --shape small --stage lora              # random weights and packs (shapes.py)
    python benchmarks/step.py --config configs/small/stage2.yaml      # a stage file's own model, data and workers

**Parts**: waiting for data, copies to the device, encoder, projector, language model, head and loss, backward pass,
optimizer, logging (what a step leaves for metrics.jsonl, and its lines), and the rest. On CUDA a part's time is that of
the device from its first kernel to its last; data wait and logging are the CPU's, which may run beside.

**Overhead**: our loop and a bare DeepSpeed loop (forward, backward, step, nothing else) take turns on the same packs in
one process, and take turns in beginning. Of each pair the ratio of their seconds is kept: what the loop adds is its
median less one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import about_this
from rig import Rig, draw_steps, start_rig
from shapes import SHAPES, TRAINABLE, stage_config

from llava_train.config import StageConfig
from llava_train.data.loader import PackedBatch, StepBatch, read_steps
from llava_train.data.mixture import open_mixture
from llava_train.stage_file import load_stage
from llava_train.train import loop as loop_module
from llava_train.train.assembly import dataset_maker, starting_point
from llava_train.train.checkpoint import Checkpoints
from llava_train.train.loop import Loop, forward, set_learning_rate
from llava_train.train.session import Session
from llava_train.train.stopwatch import Stopwatch
from llava_train.train.tracking import Tracking
from llava_train.train.window import Window
from llava_train.train.world import World, start_distributed

_MANY = 10**6
"""More steps than are ever taken: after the last a loop logs."""


class Steps:
    """The training loop of a rig, whose steps can be taken one by one."""

    def __init__(self, rig: Rig, tracking: Tracking, n_sources: int = 1) -> None:
        self.rig = rig
        checkpoints = Checkpoints(rig.engine, rig.world, rig.config.run_dir, keep=1, facts={})
        names = tuple(f"source {number}" for number in range(n_sources))
        window = Window(names, 0, rig.yardstick, Stopwatch(rig.world.device))
        session = Session(rig.world)
        self.loop = Loop(session, rig.config, rig.engine, _MANY, tracking, window, checkpoints, lambda step: None)

    def ours(self, batch: StepBatch) -> None:
        """One step of the training loop."""
        self.loop.train([batch])

    def bare(self, batch: StepBatch) -> None:
        """One step of a loop that only calls DeepSpeed."""
        engine = self.rig.engine
        set_learning_rate(engine, 0.5)
        for number, pack in enumerate(batch.micro_batches, start=1):
            engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
            loss, _ = forward(engine, pack.to(self.rig.world.device), 1.0 / batch.n_supervised)
            engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    def seconds(self, step: Callable[[StepBatch], None], batch: StepBatch) -> float:
        started = time.perf_counter()
        step(batch)
        if self.rig.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def parts_of(steps: Steps, batches: Iterable[StepBatch], n_warmup: int) -> dict[str, float]:
    """Seconds a step of each part, and of the whole, after `n_warmup` steps."""
    rig, remaining = steps.rig, iter(batches)
    device, clock = Stopwatch(rig.world.device), Stopwatch()
    n_steps = 0

    def counted() -> Iterator[StepBatch]:
        nonlocal n_steps
        while True:
            with clock("data wait"):
                batch = next(remaining, None)
            if batch is None:
                return
            n_steps += 1
            yield batch

    steps.loop.train(itertools.islice(remaining, n_warmup))
    with ExitStack() as stack:
        for target, name, watch, part in _timed(rig, device, clock):
            stack.enter_context(mock.patch.object(target, name, watch.timing(part, getattr(target, name))))
        whole_s = steps.seconds(lambda _: steps.loop.train(counted()), StepBatch(0, (), (), ()))
    return _shares(whole_s, {**device.read(), **clock.read()}, n_steps)


def _timed(rig: Rig, device: Stopwatch, clock: Stopwatch) -> Iterator[tuple[Any, str, Stopwatch, str]]:
    """Where to time what: object, attribute, watch, name of the part."""
    model = rig.llava.model.model
    yield PackedBatch, "to", device, "copies"
    yield model.vision_tower, "forward", device, "encoder"
    yield model.multi_modal_projector, "forward", device, "projector"
    yield model.language_model, "forward", device, "language model"
    yield loop_module, "forward", device, "forward"
    yield rig.engine, "backward", device, "backward"
    yield loop_module, "optimizer_step", device, "optimizer"
    yield Window, "add", clock, "logging"
    yield Loop, "_log", clock, "logging"


def _shares(whole_s: float, spent: dict[str, float], n_steps: int) -> dict[str, float]:
    models = {name: spent.get(name, 0.0) for name in ("encoder", "projector", "language model")}
    found = {"data wait": spent["data wait"], "copies": spent["copies"], **models}
    found["head and loss"] = spent["forward"] - sum(models.values())
    found |= {name: spent[name] for name in ("backward", "optimizer", "logging")}
    found["rest"] = whole_s - sum(found.values())
    return {name: seconds / n_steps for name, seconds in [*found.items(), ("step", whole_s)]}


def overhead(steps: Steps, batches: Sequence[StepBatch], n_pairs: int) -> dict[str, Any]:
    """Seconds of our step over a bare one on the same packs, pair by pair."""
    turns = (steps.bare, steps.ours)
    for turn in turns:
        turn(batches[0])
    ratios, bare_s = [], []
    for pair in range(n_pairs):
        batch = batches[pair % len(batches)]
        seconds = {turn: steps.seconds(turn, batch) for turn in (turns if pair % 2 else turns[::-1])}
        ratios.append(seconds[steps.ours] / seconds[steps.bare])
        bare_s.append(seconds[steps.bare])
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "quartiles": quartiles[::2], "pairs": n_pairs, "bare_s": bare_s}


def opened(arguments: argparse.Namespace, world: World, output: str) -> tuple[Rig, Iterable[StepBatch], int]:
    """The rig that is asked for, the steps it takes, and the number of data sources."""
    if arguments.config:
        config = load_stage(arguments.config, [*arguments.overrides, f"output={output}"])
        llava, _ = starting_point(config)
        rig = start_rig(config, world, llava)
        mixture = open_mixture(config.data, config.seed, config.cache_dir)
        dataset = dataset_maker(config, world, llava)(mixture, seed=config.seed)
        on_cuda = world.device.type == "cuda"
        steps = range(arguments.warmup + arguments.steps)
        return rig, read_steps(dataset, steps, config.loader.workers, on_cuda), len(mixture.sources)
    engine = {"zero": arguments.zero, "kernels": arguments.kernels, "activation_checkpointing": arguments.recompute}
    config = stage_config(arguments.shape, arguments.stage, arguments.batch, arguments.max_tokens, **engine)
    rig = start_rig(config.model_copy(update={"output": output}), world)
    return rig, draw_steps(rig, arguments.warmup + arguments.steps), 1


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    world = start_distributed()
    with tempfile.TemporaryDirectory() as output:
        rig, batches, n_sources = opened(arguments, world, output)
        rig.config.run_dir.mkdir(parents=True, exist_ok=True)
        with Tracking(rig.config, world, 0, _MANY) as tracking:
            steps = Steps(rig, tracking, n_sources)
            kept = list(batches) if arguments.pairs else batches
            found: dict[str, Any] = {"parts_s": parts_of(steps, kept, arguments.warmup)}
            if arguments.pairs:
                found["overhead"] = overhead(steps, list(kept), arguments.pairs)
        return {"of": {**_of(rig.config), "recompute": rig.recompute}, **found}


def _of(config: StageConfig) -> dict[str, Any]:
    return {"name": config.name, "batch": config.batch.size, "max_tokens": config.batch.max_tokens} | {
        key: getattr(config.engine, key) for key in ("zero", "precision", "kernels")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--stage", choices=list(TRAINABLE), default="lora")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--kernels", default="eager")
    parser.add_argument("--recompute", default="none", help="engine.activation_checkpointing")
    parser.add_argument("--config", type=Path, help="a stage file, in place of a shape")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=0, help="pairs of steps to measure the overhead by")
    parser.add_argument("--out", type=Path, help="file of results")
    arguments = parser.parse_args()
    found = measure(arguments)
    found = {**about_this("cuda" if torch.cuda.is_available() else "cpu"), **found}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    step_s = found["parts_s"]["step"]
    for name, seconds in found["parts_s"].items():
        print(f"{name:15} {1000 * seconds:10.2f} ms {seconds / step_s:7.2%}")
    if "overhead" in found:
        low, high = found["overhead"]["quartiles"]
        print(f"our loop / bare loop: {found['overhead']['median']:.4f} ({low:.4f} to {high:.4f})")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
