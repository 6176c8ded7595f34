"""The real path of a training step on packs of random tokens and pictures: engine, loss, loop, packs of the library.

The lengths are those of mix665k (`mix665k.py`), or of captions in stage 1. Nothing waits for data here:
`benchmarks/loader.py` measures that.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import torch
from mix665k import SYSTEM_TOKENS, TURN_TOKENS, DrawnSample, draw_samples
from shapes import SHAPES, JoinedPatches, random_llava
from transformers import LlavaForConditionalGeneration

from llava_train.config import StageConfig
from llava_train.data.chat import IGNORED, EncodedSample
from llava_train.data.loader import PackedBatch, StepBatch, pack_documents
from llava_train.data.packing import attention_cost_of, plan_packs
from llava_train.devices import DTYPES
from llava_train.model.build import Llava
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.recompute import Recompute
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.onednn import compiles_each_shape
from llava_train.train.assembly import prepare_modes
from llava_train.train.device_peaks import peak_flops_of
from llava_train.train.engine import start_engine
from llava_train.train.loop import train_step
from llava_train.train.memory import Estimator, budget_of
from llava_train.train.metrics import PackWork, Yardstick, model_flops, peak_memory_bytes
from llava_train.train.world import World

_N_PICTURES = 4
_CAPTION_TOKENS = (10, 45)


@dataclass
class Rig:
    """A model that trains."""

    config: StageConfig
    world: World
    llava: Llava
    engine: deepspeed.DeepSpeedEngine
    yardstick: Yardstick
    recompute: Recompute
    estimate_bytes: int | None
    """Memory that its heaviest pack may take, by `train/memory.py`; None where patches are joined."""

    def step(self, batch: StepBatch) -> torch.Tensor:
        """One optimizer step; its losses summed by source, [sources, 2], on the device."""
        return train_step(self.engine, self.world, batch, batch.n_supervised)[0]


def start_rig(config: StageConfig, world: World, llava: Llava | None = None) -> Rig:
    """Starts DeepSpeed on a model, by default a random one of a `shapes.stage_config`."""
    llava = llava or random_llava(config, world.device)
    set_trainable(llava.model, config.trainable, config.seed)
    estimator = Estimator(llava.model.config, world.n_ranks, world.device.type)
    recompute = estimator.choose(config, budget_of(world.device, n_ranks_on_node=1)).recompute
    joined = isinstance(llava.model.model.vision_tower, JoinedPatches)
    estimate_bytes = None if joined else estimator.estimate(config, recompute).total_bytes
    prepare_modes(llava, config, recompute)
    use_kernels(llava.model, config.engine.kernels, world.device, config.engine.zero)
    yardstick = _yardstick(config, world, llava)
    groups = parameter_groups(llava.model, config.trainable, config.schedule.weight_decay)
    engine = start_engine(PackedLoss(llava.model), groups, config)
    return Rig(config, world, llava, engine, yardstick, recompute, estimate_bytes)


def _yardstick(config: StageConfig, world: World, llava: Llava) -> Yardstick:
    model = llava.model
    flops, tower = model_flops(model, llava.n_image_tokens), model.model.vision_tower
    if flops and isinstance(tower, JoinedPatches):  # the tower computes all patches
        whole = model_flops(model, (tower.config.image_size // tower.config.patch_size) ** 2)
        assert whole is not None
        flops = replace(flops, encoder=whole.encoder)
    peak = peak_flops_of(world.device, config.engine.precision)
    return Yardstick(flops, peak, llava.n_image_tokens, model.config.image_token_id)


def stop_rig(rig: Rig) -> None:
    """Frees what a rig holds on the device; nothing else may hold a part of it."""
    rig.engine.destroy()
    vars(rig).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def draw_steps(rig: Rig, n_steps: int, seed: int = 0, n_samples: int | None = None) -> list[StepBatch]:
    """Steps of `n_samples` samples, by default the batch of the stage, packed for one rank and pinned."""
    n_samples = n_samples or rig.config.batch.size
    shape = SHAPES[rig.config.name.split("-")[0]]
    captions = rig.config.name.endswith("stage1")
    limit = rig.config.batch.max_sample_tokens
    few_sizes = compiles_each_shape(rig.world.device, DTYPES[rig.config.engine.precision])
    fill_up_to = rig.config.batch.max_tokens if few_sizes else None
    make = _Documents(rig.llava.model, rig.llava.n_image_tokens, seed, fill_up_to)
    drawn = (
        _captions(n_steps * n_samples, seed, shape.n_image_tokens)
        if captions
        else draw_samples(n_steps * n_samples, seed, shape.n_image_tokens, limit, shape.min_tokens)
    )
    return [_step(rig, number, drawn[number * n_samples : (number + 1) * n_samples], make) for number in range(n_steps)]


def draw_pack(model: LlavaForConditionalGeneration, shape_name: str, n_samples: int, seed: int = 0) -> PackedBatch:
    """One pack for a model of a shape, on the CPU."""
    shape = SHAPES[shape_name]
    drawn = draw_samples(n_samples, seed, shape.n_image_tokens, shape.max_sample_tokens, shape.min_tokens)
    return _Documents(model, shape.n_image_tokens, seed).pack(drawn)


def _captions(n: int, seed: int, n_image_tokens: int) -> list[DrawnSample]:
    """As LLaVA's 558K under the plain template: a picture and a caption."""
    rng = random.Random(seed)
    lengths = [rng.randint(*_CAPTION_TOKENS) for _ in range(n)]
    return [DrawnSample("captions", True, ((0, n),), 1 + n_image_tokens + n, n) for n in lengths]


def _step(rig: Rig, step: int, drawn: Sequence[DrawnSample], make: _Documents) -> StepBatch:
    cost = attention_cost_of(rig.llava.model.config.text_config.hidden_size)
    plan = plan_packs([sample.n_tokens for sample in drawn], 1, rig.config.batch.max_tokens, cost)[0]
    packs = tuple(make.pack([drawn[i] for i in pack]) for pack in plan)
    batch = StepBatch(step, packs, (len(drawn),), ())
    return batch.pin_memory() if rig.world.device.type == "cuda" else batch


class _Documents:
    """Random documents of given lengths, with pictures."""

    def __init__(
        self, model: LlavaForConditionalGeneration, n_image_tokens: int, seed: int, fill_up_to: int | None = None
    ) -> None:
        self.random, self.fill_up_to = np.random.default_rng(seed), fill_up_to
        config = model.config
        self.image_token, self.n_image_tokens = config.image_token_id, n_image_tokens
        self.n_words = min(config.text_config.vocab_size, config.image_token_id)
        side = config.vision_config.image_size
        generator = torch.Generator().manual_seed(seed)
        self.pictures = torch.randn(_N_PICTURES, 3, side, side, generator=generator, device="cpu")

    def pack(self, drawn: Sequence[DrawnSample]) -> PackedBatch:
        documents = [self.document(sample) for sample in drawn]
        n_images = sum(document.n_images for document in documents)
        pixels = [self.pictures[number % _N_PICTURES] for number in range(n_images)]
        filler = EncodedSample(np.zeros(2, dtype=np.int64), np.full(2, IGNORED), n_images=0)
        return pack_documents(documents, pixels, self.pictures[0], filler, [0] * len(documents), self.fill_up_to)

    def document(self, sample: DrawnSample) -> EncodedSample:
        """Template and picture first, then questions and answers; each answer and what follows it is supervised."""
        input_ids = self.random.integers(0, self.n_words, sample.n_tokens)
        labels = np.full_like(input_ids, IGNORED)
        end = sample.n_tokens
        for question, answer in reversed(sample.turns):
            taught = slice(end - answer - 1, end) if question else slice(end - answer, end)
            labels[taught] = input_ids[taught]
            end -= answer + question + (TURN_TOKENS if question else 0)
        if sample.has_image:
            start = min(1, end) if sample.source == "captions" else min(SYSTEM_TOKENS, end)
            start = min(start, max(0, end - self.n_image_tokens))
            input_ids[start : start + self.n_image_tokens] = self.image_token
        return EncodedSample(input_ids, labels, int(sample.has_image))


def measure(rig: Rig, batches: Sequence[StepBatch], n_warmup: int = 1, repeat: int = 1) -> dict[str, Any]:
    """Speed and peak memory of steps, after `n_warmup` of them; each is timed for itself, to the end on the device."""
    cuda = rig.world.device.type == "cuda"
    for batch in batches[:n_warmup]:
        rig.step(batch)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, sums = [], torch.zeros(1, 2, dtype=torch.float64, device=rig.world.device)
    timed = list(batches[n_warmup:]) * repeat
    for batch in timed:
        started = time.perf_counter()
        sums += rig.step(batch)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    work = sum((rig.yardstick.measure(pack) for batch in timed for pack in batch.micro_batches), start=PackWork())
    n_samples, total = sum(sum(batch.n_samples) for batch in timed), sum(seconds)
    loss_sum, n_supervised = sums[0].tolist()
    tflops = work.flops / total / 1e12
    return {
        "tflops": tflops if rig.yardstick.flops else None,
        "mfu": tflops * 1e12 / rig.yardstick.peak_flops if rig.yardstick.flops and rig.yardstick.peak_flops else None,
        "tokens_per_s": work.n_tokens / total,
        "text_tokens_per_s": work.n_text_tokens / total,
        "samples_per_s": n_samples / total,
        "peak_gib": peak_memory_bytes(rig.world.device) / 2**30,
        "estimate_gib": rig.estimate_bytes and rig.estimate_bytes / 2**30,
        "step_s": statistics.median(seconds),
        "steps_s": [round(value, 4) for value in seconds],
        "samples_a_step": n_samples / len(timed),
        "packs_a_step": sum(len(batch.micro_batches) for batch in timed) / len(timed),
        "tokens_a_pack": work.n_tokens / sum(len(batch.micro_batches) for batch in timed),
        "loss": loss_sum / n_supervised,
    }
