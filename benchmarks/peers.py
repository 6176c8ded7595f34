"""llava_train and other trainers of vision-language models on the same work, in one run.

    python benchmarks/peers.py --peer trl,trl:8,llamafactory,none --device cpu --shape small
    python benchmarks/peers.py --peer trl,llava,llamafactory,none --device cuda --shape 7b-lora

`none` is llava_train alone. A peer may be followed by a variant, `trl:4` or `llamafactory:exact`; what variants there
are stands in peers/run_NAME.py. The weights, the samples and the optimizer steps are the same for all (`workload.py`);
each peer runs in an environment of its own (`peers/environments.py`). They run one after another, in another order each
repeat, and a repeat's ratio is that of two runs minutes apart: nothing else should run beside.

samples/s are those of the steps after the warm-up, from the end of one step to the end of the next: data, forward,
backward and optimizer. Where a peer's steps have other samples than planned, they are its tokens/s by the mean length
of a sample. Memory is the largest sum over the peer's processes, less what they may share, on a CPU, the most that
torch allocated on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))

from environments import ENVIRONMENTS, python_of  # noqa: E402
from machine import about_this  # noqa: E402
from peer_shapes import SHAPES  # noqa: E402
from peers_report import report, summarize  # noqa: E402

_POLL_S = 0.5
_FORMATS = {"none": "stage.yaml", "trl": "model", "llamafactory": "model", "llava": "original"}
"""What of the workload each peer reads."""


def main() -> None:
    arguments = parse()
    scratch = Path(tempfile.mkdtemp(prefix="peers-", dir=arguments.scratch))
    try:
        results = compare(arguments, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if arguments.save:
        day = datetime.now(timezone.utc).date()
        path = HERE / "results" / f"peers-{arguments.shape}-{arguments.device}-{day}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    print(report(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", default="trl,trl:8,llamafactory,none", help="NAME[:VARIANT],... (default %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--stage", choices=("1", "2", "lora"), help="what trains; default: the shape's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the shape's")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before them (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each peer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: one a core")
    parser.add_argument("--limit", type=int, default=900, help="seconds that one run may take (default %(default)s)")
    parser.add_argument("--parts", type=Path, default=Path("parts"), help="of data/build_small_parts.py")
    parser.add_argument("--scratch", type=Path, help="where a temporary folder is made; default: the system's")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/peers-SHAPE-DEVICE-DAY.json")
    arguments = parser.parse_args()
    for peer in (named.partition(":")[0] for named in arguments.peer.split(",")):
        if peer not in (*ENVIRONMENTS, "none"):
            parser.error(f"--peer: {peer} is none of {', '.join(ENVIRONMENTS)}, none")
    if SHAPES[arguments.shape].cuda_only and arguments.device == "cpu":
        parser.error(f"--shape: {arguments.shape} needs --device cuda")
    return arguments


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs all peers `--repeats` times; returns what the JSON file holds."""
    peers = arguments.peer.split(",")
    pythons = {peer: python_of(peer.partition(":")[0], arguments.device == "cuda") for peer in peers}
    n_steps = arguments.warmup + arguments.steps
    formats = {_FORMATS[peer.partition(":")[0]] for peer in peers}
    from workload import make_workload  # not before the arguments are known to be right: it takes seconds

    shape = SHAPES[arguments.shape]
    shape = replace(shape, stage=arguments.stage or shape.stage, precision=arguments.precision or shape.precision)
    workload = make_workload(scratch / "workload", shape, n_steps, arguments.parts, arguments.seed, formats)
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for repeat in range(arguments.repeats):
        shift = repeat % len(peers)
        for peer in peers[shift:] + peers[:shift]:
            found = run_peer(peer, pythons[peer], scratch, arguments)
            runs[peer].append(found)
            timed = sum(step["s"] for step in found.get("steps", [])[arguments.warmup :])
            print(f"{peer}: {found.get('error') or f'{timed:.1f} s in timed steps'}", file=sys.stderr, flush=True)
    samples = workload.pop("samples")
    return {
        **about_this(arguments.device),
        "workload": workload,
        "lengths": [sample["n_tokens"] for sample in samples],
        "n_supervised": [sample["n_supervised"] for sample in samples],
        "several_turns": sum(len(sample["conversations"]) > 2 for sample in samples) / len(samples),
        "text_only": sum("image" not in sample for sample in samples) / len(samples),
        "shape": arguments.shape,
        "threads": arguments.threads,
        "n_warmup": arguments.warmup,
        "peers": summarize(runs, samples, workload["batch_size"], arguments.warmup),
        "runs": runs,
    }


def run_peer(peer: str, python: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of one peer: what its script wrote, its memory and wall time; `error` where it failed."""
    name, _, variant = peer.partition(":")
    own = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
    job = {"workload": str(scratch / "workload"), "device": arguments.device, "variant": variant}
    job |= {"scratch": str(own / "scratch"), "result": str(own / "result.json")}
    (own / "job.json").write_text(json.dumps(job), encoding="utf-8")
    started = time.perf_counter()
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            [str(python), str(HERE / "peers" / f"run_{name}.py"), str(own / "job.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=own,
            env=_environment(name, arguments),
            start_new_session=True,
        )
        peak_bytes = _watch_memory(process, started + arguments.limit)
    wall_s = time.perf_counter() - started
    if process.returncode or not (own / "result.json").is_file():
        tail = (own / "log").read_text(errors="replace")[-3000:]
        return {"error": f"exit code {process.returncode}", "log": tail, "wall_s": wall_s}
    found: dict[str, Any] = json.loads((own / "result.json").read_text(encoding="utf-8"))
    shutil.rmtree(own, ignore_errors=True)
    return {**found, "peak_own_bytes": peak_bytes, "wall_s": wall_s}


def _environment(peer: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Every peer has all cores, no network, and no module of ours on its path but `none`."""
    ours = ("PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
    kept |= offline | {"OMP_NUM_THREADS": str(arguments.threads)}
    if arguments.device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    if peer == "none":
        kept["PYTHONPATH"] = str(HERE.parent)
    return kept


def _watch_memory(process: subprocess.Popen[bytes], latest_end: float) -> int:
    """Waits for a process; returns the largest memory of its family, in bytes. Kills its group at `latest_end`."""
    peak, done = 0, threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set()), daemon=True).start()
    while not done.wait(_POLL_S):
        if time.perf_counter() > latest_end:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
                os.killpg(process.pid, signal.SIGKILL)
        total = 0
        try:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        for member in family:
            try:
                memory = member.memory_info()  # PSS would stop the process while its pages are counted
                total += memory.rss - memory.shared
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak = max(peak, total)
    return peak


if __name__ == "__main__":
    main()
