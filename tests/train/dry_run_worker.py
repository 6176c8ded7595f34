"""Trains each case with and without a dry run before it, for `test_dry_run`; run by `helpers.run_ranks`.

python -m tests.train.dry_run_worker DATA OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from llava_train.train.heaviest import PackShape
from llava_train.train.world import start_distributed
from tests.train.equivalence_worker import LORA, Case, train_case

HEAVY = PackShape((160, 160, 100), n_images=12, n_image_tokens=4, image_size=28)
CASES = {
    **{f"zero{zero}": Case(zero) for zero in (0, 1, 2, 3)},
    **{f"zero{zero}-bf16": Case(zero, precision="bf16") for zero in (0, 1, 2, 3)},
    "zero3-lora-full": Case(3, trainable=LORA, engine={"activation_checkpointing": "full"}),
    "zero2-offload": Case(2, engine={"offload_optimizer": True}),
}


def main() -> None:
    data, out = Path(sys.argv[1]), sys.argv[2]
    world, results = start_distributed(), {}
    for name, case in CASES.items():
        plain = train_case(case, data, world)
        results[name] = plain, train_case(replace(case, dry_run=HEAVY), data, world)
    if world.is_main:
        torch.save(results, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
