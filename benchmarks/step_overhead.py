"""Share of a training step outside forward, backward and the optimizer: data wait, planning, logging.

    python benchmarks/step_overhead.py --config configs/small/stage2.yaml --steps 12

Runs the real loop on a stage file, with timers around what the engine does. On CUDA the timers wait for the device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llava_train.config import StageConfig
from llava_train.data.loader import read_steps
from llava_train.data.mixture import open_mixture
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.stage_file import load_stage
from llava_train.train.checkpoint import Checkpoints
from llava_train.train.engine import start_engine
from llava_train.train.loop import Loop
from llava_train.train.session import Session
from llava_train.train.stage import _dataset_maker, _prepare_modes, _starting_point
from llava_train.train.tracking import Tracker
from llava_train.train.window import Window
from llava_train.train.world import start_distributed


class TimedEngine:
    """A DeepSpeed engine that adds up the seconds of its forward, backward and optimizer steps."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.busy_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._timed(self._engine, **inputs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(self._engine.backward, *args, **kwargs)

    def step(self) -> Any:
        return self._timed(self._engine.step)

    def _timed(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.busy_s += time.perf_counter() - started
        return result


def measure(config: StageConfig, n_steps: int, n_warmup: int = 2) -> dict[str, float]:
    """Seconds a step, and the share of it that the engine was not busy, over `n_steps` after the warm-up."""
    world = start_distributed()
    llava, _ = _starting_point(config)
    set_trainable(llava.model, config.trainable, config.seed)
    _prepare_modes(llava, config, "none")
    groups = parameter_groups(llava.model, config.trainable, config.schedule.weight_decay)
    engine = TimedEngine(start_engine(PackedLoss(llava.model), groups, config))
    mixture = open_mixture(config.data, config.seed, config.cache_dir)
    dataset = _dataset_maker(config, world, llava)(mixture, seed=config.seed)
    marks: list[tuple[float, float]] = []
    total = n_steps + n_warmup
    config.run_dir.mkdir(parents=True)
    with Tracker(config, world, 0, total) as tracker:
        batches = read_steps(dataset, range(total), config.loader.workers, world.device.type == "cuda")

        def after_step(_: int) -> None:
            marks.append((time.perf_counter(), engine.busy_s))

        window = Window(tuple(source.name for source in mixture.sources))
        checkpoints = Checkpoints(engine, world, config.run_dir, keep=1, facts={})
        Loop(Session(world), config, engine, total, tracker, window, checkpoints, after_step).train(batches)
    (start, busy_start), (end, busy_end) = marks[n_warmup - 1], marks[-1]
    step_s = (end - start) / n_steps
    return {"step_s": step_s, "outside_engine": 1 - (busy_end - busy_start) / (end - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_stage(arguments.config, [*arguments.overrides, f"output={folder}"])
        result = measure(config, arguments.steps)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps({"config": str(arguments.config), "device": device, **result}))


if __name__ == "__main__":
    main()
