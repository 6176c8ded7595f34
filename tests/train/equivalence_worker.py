"""Trains the cases of `test_equivalence` on every rank and writes what rank 0 knows; run by `helpers.run_ranks`.

python -m tests.train.equivalence_worker DATA OUT CASE [CASE ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_train.config import StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor
from llava_train.data.loader import StepDataset
from llava_train.data.mixture import Mixture
from llava_train.data.sources import open_source
from llava_train.model.build import Llava, build_llava
from llava_train.model.kernels import use_kernels
from llava_train.model.loss import PackedLoss
from llava_train.model.trainable import parameter_groups, set_trainable
from llava_train.stage_file import parse_stage
from llava_train.train.assembly import prepare_modes
from llava_train.train.dry_run import dry_run
from llava_train.train.engine import gathered, start_engine
from llava_train.train.heaviest import PackShape
from llava_train.train.loop import set_learning_rate, train_step
from llava_train.train.world import World, start_distributed
from tests.train.helpers import stage_content

STEPS = ("itimti", "tttitt", "tttttt", "miitit", "i")
"""The samples of each step: many with images, one, none, many, and one sample for all ranks."""
BATCH_SIZE = 6
WEIGHT_DECAY = 0.1
FACTORS = (0.25, 1.0, 0.5, 0.75, 0.1)
"""Learning rate of each step, of its peak."""
LONGEST = 160
"""Tokens that every sample stays below."""

ALL = {"projector": {"lr": 2e-3}, "language_model": {"lr": 1e-3}}
TOWER_TOO = {**ALL, "vision_tower": {"lr": 5e-4}}
PROJECTOR = {"projector": {"lr": 2e-3}}
LORA = {**ALL, "language_model": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}


@dataclass(frozen=True)
class Case:
    """One way to train on the same steps."""

    zero: int
    max_tokens: int = LONGEST
    packing: bool = True
    trainable: dict[str, Any] = field(default_factory=lambda: ALL)
    projector: str = "mlp2x_gelu"
    precision: str = "fp32"
    clip: float = 1.0
    engine: dict[str, Any] = field(default_factory=dict)
    dry_run: PackShape | None = None

    def config(self) -> StageConfig:
        content = stage_content(trainable=self.trainable, schedule={"clip": self.clip})
        content["model"]["projector"] = self.projector
        content["engine"] = {
            "zero": self.zero,
            "precision": self.precision,
            "activation_checkpointing": "none",
            **self.engine,
        }
        return parse_stage(content, "test")


CHECKPOINTING = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing": "selective"}
OFFLOAD_OPTIMIZER = {"offload_optimizer": True}
OFFLOAD_BOTH = {"offload_optimizer": True, "offload_parameters": True}


def _each(name: str, stages: tuple[int, ...], **settings: Any) -> dict[str, Case]:
    return {f"zero{zero}-{name}": Case(zero, **settings) for zero in stages}


CASES = {
    **_each("one-pack", (0, 1, 2, 3), max_tokens=4096),
    **_each("small-packs", (0, 1, 2, 3)),
    **_each("unpacked", (0, 1, 2, 3), packing=False),
    **_each("checkpointing", (2, 3), engine=CHECKPOINTING),
    **_each("selective", (0, 2, 3), engine=SELECTIVE),
    **_each("lora-selective", (3,), trainable=LORA, clip=0.5, engine=SELECTIVE),
    **_each("tower-too", (0, 2), trainable=TOWER_TOO),
    **_each("tower-too-checkpointing", (3,), trainable=TOWER_TOO, engine=CHECKPOINTING),
    **_each("projector", (0, 2, 3), trainable=PROJECTOR, clip=0.02),
    **_each("linear-projector", (2, 3), trainable=PROJECTOR, projector="linear", clip=0.02),
    **_each("lora", (0, 2, 3), trainable=LORA, clip=0.5),
    **_each("lora-checkpointing", (3,), trainable=LORA, clip=0.5, engine=CHECKPOINTING),
    **_each("offload-optimizer", (1, 2), engine=OFFLOAD_OPTIMIZER),
    **_each("offload-both", (3,), engine=OFFLOAD_BOTH),
    **_each("compiled", (3,), engine={"kernels": "compile"}),
    **_each("compiled-checkpointing", (3,), engine={"kernels": "compile", **CHECKPOINTING}),
    **_each("bf16-one-pack", (0, 1, 2, 3), max_tokens=4096, precision="bf16"),
    **_each("bf16-unpacked", (0, 1, 2, 3), packing=False, precision="bf16"),
}


def new_model(config: StageConfig) -> Llava:
    """The untrained model of a case, its trainable parts set."""
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    llava = build_llava(config.model, config.image, dtype, config.seed)
    llava.processor.chat_template = load_template(config.model.chat_template, llava.tokenizer)
    set_trainable(llava.model, config.trainable, config.seed)
    with torch.no_grad():  # adapters start at zero, and then half of their gradients are zero too
        for name, parameter in llava.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return llava


def encoder_of(llava: Llava) -> ChatEncoder:
    return ChatEncoder(llava.tokenizer, llava.processor.chat_template, llava.n_image_tokens, LONGEST)


def train_case(case: Case, data: Path, world: World) -> dict[str, Any]:
    config = case.config()
    llava = new_model(config)
    prepare_modes(llava, config, config.engine.activation_checkpointing)
    use_kernels(llava.model, config.engine.kernels, world.device, config.engine.zero)
    dataset = StepDataset(
        Mixture([open_source(data)]),
        encoder_of(llava),
        ImagePreprocessor(llava.processor.image_processor),
        batch_size=BATCH_SIZE,
        max_tokens=case.max_tokens,
        seed=None,
        rank=world.rank,
        n_ranks=world.n_ranks,
        packing=case.packing,
    )
    engine = start_engine(
        PackedLoss(llava.model), parameter_groups(llava.model, config.trainable, WEIGHT_DECAY), config
    )
    if case.dry_run:
        dry_run(engine, world, case.dry_run)
    losses, norms, of_parts, micro_steps, images = [], [], [], [], []
    for step, factor in enumerate(FACTORS):
        batch = dataset[step]
        set_learning_rate(engine, factor)
        n_supervised = world.sum(batch.n_supervised)[0]
        sums, norm, _ = train_step(engine, world, batch, n_supervised)
        sums = sums.sum(dim=0)
        torch.distributed.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
        norms.append(float(norm))
        of_parts.append({part: norm.of_part(part) for part in config.trainable.learning_rates()})
        micro_steps.append(len(batch.micro_batches))
        images.append(batch.n_images)
    of_ranks: list[Any] = [None] * world.n_ranks
    torch.distributed.all_gather_object(of_ranks, (micro_steps, images))
    weights = gathered(engine, world, llava.model)
    _, accumulated_in = engine.get_data_types()
    engine.destroy()
    return {
        "losses": losses,
        "norms": norms,
        "of_parts": of_parts,
        "weights": weights,
        "micro_steps": [of_rank[0] for of_rank in of_ranks],
        "images": [of_rank[1] for of_rank in of_ranks],
        "accumulated_in": str(accumulated_in),
        "skipped": engine.skipped_steps,
    }


def main() -> None:
    data, out, *names = sys.argv[1:]
    world = start_distributed()
    results = {}
    for name in names:
        try:
            results[name] = train_case(CASES[name], Path(data), world)
        except Exception as error:  # the other cases are still worth having
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if world.is_main:
        torch.save(results, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
