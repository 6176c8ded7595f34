"""How long data takes: opening a JSON of the size of LLaVA-mix665k, the first batch, samples a second, waiting.

    python benchmarks/loader.py [--rows 665298] [--out FOLDER] [--workers 2] [--gpu 25]

The file is generated: as many rows as mix665k, texts of its length. Memory is the proportional set size (PSS) of this
process and its workers together, so that shared pages count once. The loader reads JPEGs of 640 x 480 and prepares
them as CLIP-336 sees them, with the tokenizer of bytes; a profile of one process says where its time goes. The share
of waiting is what a GPU that trains on `--gpu` samples a second would wait for data: its steps are slept here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about_this
from PIL import Image

from llava_train.config import ImageSection, ModelSection, RandomLanguageModel, RandomVisionTower
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor, decode_image
from llava_train.data.loader import StepBatch, StepDataset, read_steps
from llava_train.data.mixture import Mixture
from llava_train.data.sources import open_source
from llava_train.model.processor import build_processor

CLIP_336 = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
H100_SAMPLES_PER_S = 25
WORDS = [
    "the", "a", "man", "cat", "dog", "standing", "sitting", "on", "in", "of", "with", "next", "to", "red", "blue",
    "large", "small", "table", "street", "what", "is",
]  # fmt: skip


def write_rows(path: Path, n_rows: int, n_pictures: int) -> None:
    """Rows of two to five questions, about 1.5 kB each, as mix665k has them."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(5, 80))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_rows):
            turns: list[dict[str, str]] = []
            for number in range(rng.randrange(2, 6)):
                mark = "<image>\n" if number == 0 else ""
                turns.append({"from": "human", "value": mark + rng.choice(texts)})
                turns.append({"from": "gpt", "value": rng.choice(texts)})
            row = {"id": f"{i:012}", "image": f"{i % n_pictures:05}.jpg", "conversations": turns}
            file.write(("[" if i == 0 else ",\n") + json.dumps(row))
        file.write("]")


def write_pictures(folder: Path, n_pictures: int) -> None:
    """JPEGs of 640 x 480 of about the size of a photograph's."""
    rng = np.random.default_rng(0)
    for i in range(n_pictures):
        coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        noise = rng.normal(0, 8, (480, 640, 3))
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), dtype=float)
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=85)


def pss_bytes() -> int:
    """Memory of this process and its children; shared pages are divided among those that share them."""
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    total = 0
    for pid in [str(os.getpid()), *children.split()]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def opening(path: Path, cache: Path, workers: int) -> dict[str, Any]:
    """Seconds and memory of opening, in a fresh process each time."""
    found: dict[str, Any] = {}
    for name in ("first_open", "second_open"):
        command = [sys.executable, __file__, "--open", str(path), "--out", str(cache), "--workers", str(workers)]
        found[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def open_once(path: Path, cache: Path, workers: int) -> dict[str, float]:
    """Opens the file, and reads a first batch with `workers` processes."""
    front_of = parts()
    before = pss_bytes()
    started = time.perf_counter()
    source = open_source(path, path.parent, cache=cache)
    opened = time.perf_counter()
    dataset = dataset_of(Mixture([source]), front_of, batch_size=16)
    batches = read_steps(dataset, range(100), workers, pin_memory=False)
    next(iter(batches))
    ready = time.perf_counter()
    return {
        "open_s": opened - started,
        "first_batch_s": ready - opened,
        "memory_GB": pss_bytes() / 1e9,
        "memory_before_GB": before / 1e9,
    }


def parts() -> Any:
    section = ModelSection(
        language_model=RandomLanguageModel(config={"model_type": "llama"}),
        vision_tower=RandomVisionTower(config=CLIP_336),
        chat_template="vicuna_v1",
    )
    return build_processor(section, ImageSection())


def dataset_of(mixture: Mixture, front: Any, batch_size: int) -> StepDataset:
    encoder = ChatEncoder(
        front.tokenizer, load_template("vicuna_v1", front.tokenizer), front.n_image_tokens, 8192, "truncate"
    )
    preprocessor = ImagePreprocessor(front.processor.image_processor)
    return StepDataset(mixture, encoder, preprocessor, batch_size=batch_size, max_tokens=32768, seed=0)


def throughput(mixture: Mixture, front: Any, workers: int, batch_size: int = 32) -> float:
    """Samples a second that `workers` processes deliver."""
    batches, n_timed = steady_batches(dataset_of(mixture, front, batch_size), workers)
    started = time.perf_counter()
    n_samples = sum(sum(next(batches).n_samples) for _ in range(n_timed))
    return n_samples / (time.perf_counter() - started)


def waiting(mixture: Mixture, front: Any, workers: int, gpu: float, batch_size: int = 32) -> float:
    """Share of its time in which a GPU that takes `gpu` samples a second waits for `workers` processes."""
    batches, n_timed = steady_batches(dataset_of(mixture, front, batch_size), workers, batch_size / gpu)
    waited, started = 0.0, time.perf_counter()
    for _ in range(n_timed):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(batch_size / gpu)
    return waited / (time.perf_counter() - started)


def steady_batches(dataset: StepDataset, workers: int, step_s: float = 0.0) -> tuple[Iterator[StepBatch], int]:
    """Batches less the first ones, for each of which `step_s` is slept, and how many of them to time.

    Workers begin before anyone asks, with two batches each and a third as soon as one is taken: what they have ready
    does not count. Nor do they run dry at the end: there are as many batches more than are timed.
    """
    n_ahead, n_timed = 3 * max(1, workers), 6 * max(2, workers)
    batches = read_steps(dataset, range(n_ahead + n_timed + n_ahead), workers, pin_memory=False)
    for _ in range(n_ahead):
        next(batches)
        time.sleep(step_s)
    return batches, n_timed


def profile(mixture: Mixture, front: Any, n_samples: int = 200) -> dict[str, float]:
    """Milliseconds a sample of each part, in one process of one thread."""
    dataset, spent = dataset_of(mixture, front, 1), dict.fromkeys(("parse", "tokenize", "decode", "preprocess"), 0.0)
    for index in range(n_samples):
        marks = [time.perf_counter()]
        sample = mixture[index]
        marks.append(time.perf_counter())
        dataset.encoder.encode(sample)
        marks.append(time.perf_counter())
        pictures = [decode_image(picture) for picture in sample.images]
        marks.append(time.perf_counter())
        for picture in pictures:
            dataset.preprocessor(picture)
        marks.append(time.perf_counter())
        for name, started, ended in zip(spent, marks[:-1], marks[1:], strict=True):
            spent[name] += ended - started
    return {name: 1000 * seconds / n_samples for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=665_298)
    parser.add_argument("--out", type=Path, default=Path("/tmp/llava-train-loader"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", type=float, default=H100_SAMPLES_PER_S, help="samples a second that a GPU trains on")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.open:
        print(json.dumps(open_once(arguments.open, arguments.out, arguments.workers)))
        return
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{arguments.rows}.json"
    n_pictures = 200
    write_pictures(folder, n_pictures)
    write_rows(path, arguments.rows, n_pictures)
    for old in (folder / "cache").glob("*"):
        old.unlink()
    result: dict[str, Any] = {
        **about_this("cpu"),
        "rows": arguments.rows,
        "file_GB": path.stat().st_size / 1e9,
        "workers": arguments.workers,
        **opening(path, folder / "cache", arguments.workers),
    }
    mixture, front = Mixture([open_source(path, folder, cache=folder / "cache")]), parts()
    result["ms_a_sample"] = profile(mixture, front)
    numbers = sorted({0, 1, arguments.workers})
    result["samples_per_s"] = {str(n): throughput(mixture, front, n) for n in numbers}
    result["waiting_share"] = {str(n): waiting(mixture, front, n, arguments.gpu) for n in numbers}
    result["gpu_samples_per_s"] = arguments.gpu
    result["cores_to_feed_an_H100"] = H100_SAMPLES_PER_S * sum(result["ms_a_sample"].values()) / 1000
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
