"""A tiny checkout in which a page's commands run: every stage file under its own name, with random parts and few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from notebooks.conftest import FEWER, make_parts
from tests.scripts import ROOT
from tests.tiny import LANGUAGE_MODEL, VISION_TOWER
from tests.train.helpers import run_ranks, write_samples

SCENES = ["--captions", "16", "--conversations", "16", "--held-out", "7"]
TRAINED = ("small/stage1", "small/stage2", "llava-1.5-7b/stage1", "llava-1.5-7b/stage2", "llava-1.5-7b/stage2-lora")
PICTURES = ("PICTURE.png", "dog.jpg", "cat.jpg", "a.png", "b.png", "my-pictures/dog.jpg")
"""What the pages call a reader's own files."""
QUESTIONS = ("pope.jsonl", "vqav2.jsonl", "questions.jsonl")
OWN_STAGES = {
    "stage1.yaml": "configs/llava-1.5-7b/stage1.yaml",
    "stage2.yaml": "configs/llava-1.5-7b/stage2.yaml",
    "my-stage2.yaml": "configs/small/stage2.yaml",
}


WIDER = {**LANGUAGE_MODEL, "hidden_size": 64, "intermediate_size": 128}
"""As wide as weights in 4 bits must be on a CPU."""


def make_home(home: Path) -> None:
    """Writes the checkout and trains what the pages take for trained."""
    home.mkdir(exist_ok=True)
    for name in ("scripts", "docs", "notebooks", "mkdocs.yml", "README.md", "setup.cfg", "constraints.txt", "tests"):
        (home / name).symlink_to(ROOT / name)
    (home / "data").mkdir()
    for script in (ROOT / "data").glob("*.*"):
        (home / "data" / script.name).symlink_to(script)
    shutil.copytree(ROOT / "configs/smoke/data", home / "configs/smoke/data")
    for stage in (ROOT / "configs").glob("*/*.yaml"):
        shrink_stage(stage, home / stage.relative_to(ROOT))
    for name, stage_file in OWN_STAGES.items():
        own = yaml.safe_load((home / stage_file).read_text(encoding="utf-8")) | {"name": Path(name).stem}
        (home / name).write_text(yaml.safe_dump(own, sort_keys=False), encoding="utf-8")
    make_parts(home / "parts")
    make_data(home)
    make_small_files(home)
    train(home)


def shrink_stage(stage: Path, target: Path) -> None:
    """A stage file with random parts in place of those of the hub, and few samples and steps."""
    content: dict[str, Any] = yaml.safe_load(stage.read_text(encoding="utf-8"))
    if not str(content["model"]["language_model"]).startswith("parts/"):
        content["model"] |= {"language_model": {"config": WIDER}, "vision_tower": {"config": VISION_TOWER}}
    in_4_bits = "quantize_base" in str(content["trainable"])
    content["batch"] = {**content["batch"], **FEWER["batch"]}
    content["schedule"] = {**content.get("schedule", {}), **FEWER["schedule"]}
    content["engine"] = {**content.get("engine", {}), "precision": "bf16" if in_4_bits else "fp32"}
    content |= {key: FEWER[key] for key in ("checkpoint", "logging")} | {"loader": {"workers": 0}}
    if "eval" in content:
        content["eval"] |= {"every": 2, "max_samples": 4, "generate": 1, "max_new_tokens": 4}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def make_data(home: Path) -> None:
    """The data that the stage files name."""
    run_ranks(["data/draw_scenes.py", "--out", "data/scenes", *SCENES], home).check()
    for name, images in (
        ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "data/LLaVA-Pretrain/images"),
        ("llava_v1_5_mix665k.json", "data/images"),
    ):
        path = home / "data" / name
        path.parent.mkdir(exist_ok=True)
        write_samples(path, "iiiiiiii")
        path.write_text(path.read_text(encoding="utf-8").replace("images/", ""), encoding="utf-8")
        assert (home / images).is_dir()
    shutil.copytree(home / "data/images", home / "playground/data")
    shutil.copy(home / "data/llava_v1_5_mix665k.json", home / "playground/data")


def make_small_files(home: Path) -> None:
    """The files that a reader would have of his own."""
    for name in (*PICTURES, "coco/val2014/dog.jpg"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(home / name)
    row = {"question_id": 1, "image": "dog.jpg", "text": "Is there a dog?", "label": "yes", "answer": "yes"}
    for name in QUESTIONS:
        (home / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    make_projector(home / "checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin")
    for program in ("python", "pip", "activate"):
        for venv in (".venv/bin", "lmms-env/bin"):
            (home / venv).mkdir(parents=True, exist_ok=True)
            (home / venv / program).touch()


def make_projector(path: Path) -> None:
    """One of the original LLaVA, for the shapes of `shrink_stage`."""
    width, wider = VISION_TOWER["hidden_size"], WIDER["hidden_size"]
    layers = {f"model.mm_projector.{at}.weight": torch.zeros(wider, of) for at, of in ((0, width), (2, wider))}
    layers |= {name.replace("weight", "bias"): torch.zeros(wider) for name in layers}
    path.parent.mkdir(parents=True)
    torch.save(layers, path)


def train(home: Path) -> None:
    """Trains the runs that the pages speak of; `RUN` and `runs/NAME` are one of them."""
    stages = [f"configs/{name}.yaml" for name in TRAINED]
    run_ranks(["scripts/train.py", "--config", *stages], home).check()
    (home / "RUN").symlink_to("runs/small-stage2")
    shutil.copytree(home / "runs/small-stage2", home / "runs/NAME")
