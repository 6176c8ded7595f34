"""Hours and memory for the recipes table in README.md: `llava-train plan` for the files in configs/, without a hub.

    python benchmarks/plans.py                            # prints the table; --json for the figures alone
    python benchmarks/plans.py --config configs/llava-1.5-7b/stage2-qlora.yaml --gpus 1 --memory 24G --device RTX4090

Where a stage file names a part on the hub, random weights of the part's published shape stand for it: a plan needs only
shapes. Nothing is downloaded, and lengths of the data are assumed where the data are not there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from sizes import CLIP_L_224, CLIP_L_336, VICUNA_7B, VICUNA_13B

from llava_train.config import StageConfig
from llava_train.inspect.plan import bytes_of, make_plan
from llava_train.stage_file import parse_stage
from llava_train.train.memory import GIB

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [*sorted((ROOT / "configs").glob("llava-*/*.yaml"))]
SHAPES = {
    "lmsys/vicuna-7b-v1.3": VICUNA_7B,
    "lmsys/vicuna-7b-v1.5": VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
    "openai/clip-vit-large-patch14": CLIP_L_224,
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
}


def with_shapes(path: Path) -> StageConfig:
    """A stage file whose parts on the hub are random ones of the same shape. Raises KeyError for other parts."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in ("language_model", "vision_tower"):
        content["model"][part] = {"config": SHAPES[content["model"][part]]}
    return parse_stage(content, str(path))


def plans(paths: Sequence[Path], devices: Sequence[str], n_gpus: int, memory: str) -> list[dict[str, Any]]:
    """For each stage file: GiB of a GPU, activation checkpointing, steps, and the hours on each of `devices`."""
    found = []
    for path in paths:
        config = with_shapes(path)
        of_devices = {device: make_plan(config, n_gpus, bytes_of(memory), device) for device in devices}
        plan = of_devices[devices[0]]
        found.append(
            {
                "config": str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path),
                "fits": plan.fits,
                "gib": round(plan.estimate.total_bytes / GIB, 1),
                "activation_checkpointing": plan.estimate.recompute,
                "steps": plan.n_steps,
                "hours": {device: round(one.hours, 1) for device, one in of_devices.items() if one.hours is not None},
            }
        )
    return found


def table(found: Sequence[dict[str, Any]], devices: Sequence[str], n_gpus: int, memory: str) -> str:
    """The plans in Markdown."""
    hours = " | ".join(f"hours, {n_gpus} {device}" for device in devices)
    lines = [f"| stage file | steps | {hours} | GiB of {memory} | recomputed |", "|---" * (4 + len(devices)) + "|"]
    for plan in found:
        of_devices = " | ".join(str(plan["hours"].get(device, "?")) for device in devices)
        gib = f"{plan['gib']}" if plan["fits"] else f"{plan['gib']}: does not fit"
        lines.append(
            f"| {plan['config']} | {plan['steps'] or '?'} | {of_devices} | {gib} | {plan['activation_checkpointing']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=RECIPES)
    parser.add_argument("--device", nargs="+", default=["A100", "H100"])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--memory", default="80G")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = plans(args.config, args.device, args.gpus, args.memory)
    print(json.dumps(found) if args.json else table(found, args.device, args.gpus, args.memory))


if __name__ == "__main__":
    main()
