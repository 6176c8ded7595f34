"""The machine around Python: programs, variables, disks, the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from llava_train.doctor.findings import Finding, Level
from llava_train.doctor.processes import LAUNCHERS

HUB_TIMEOUT_S = 3.0
_GB = 1e9
_SHM_BYTES = 1e9
_DISK_BYTES = 20e9
"""About what a model of 7 billion weights in bf16 takes, and a little."""

_TOOLS = {
    "git": "the commit of a run in its config.yaml",
    "c++": "`engine.kernels: compile`",
    "nvcc": "building packages with CUDA kernels, such as flash-attn",
    "sbatch": "`llava-train slurm`",
}
_LAUNCHER_TOOLS = ("deepspeed", "torchrun")

_VALUES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "GLOO_SOCKET_IFNAME",
    "TORCH_CUDA_ARCH_LIST",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WANDB_MODE",
)
_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")


def tools(path: str | None = None) -> Iterator[Finding]:
    """Programs on the PATH; launchers of another Python than this one would train with that."""
    here = Path(sys.executable).parent
    for name in _LAUNCHER_TOOLS:
        where = shutil.which(name, path=path)
        if where is None:
            yield Finding(
                "tools", Level.warning, f"{name} is not on the PATH", "activate the environment of this Python"
            )
        elif Path(where).parent != here:
            text = f"{name} on the PATH is {where}, of another Python than {sys.executable}"
            yield Finding("tools", Level.warning, text, "activate the environment of this Python")
    there = [name for name in (*_LAUNCHER_TOOLS, *_TOOLS) if shutil.which(name, path=path)]
    yield Finding("tools", Level.ok, f"on the PATH: {', '.join(there) or 'none'}")
    for name, use in _TOOLS.items():
        if name not in there:
            yield Finding("tools", Level.note, f"no {name}, which is for {use}")


def environment(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that change what a run does. Of secrets only whether they are set."""
    names = [name for name in variables if name in _VALUES or name.startswith("NCCL_")]
    shown = [f"{name}={variables[name]}" for name in sorted(names)]
    shown += [f"{name} {'is set' if variables.get(name) else 'is not set'}" for name in _SECRETS]
    yield Finding("variables", Level.ok, ", ".join(shown))
    left = [name for name in LAUNCHERS if name in variables]
    if left:
        text = f"{', '.join(left)} set as by a launcher: a command takes itself for one rank and waits for the others"
        yield Finding("variables", Level.warning, text, f"unset {' '.join(left)}")


def hub_cache(variables: Mapping[str, str] = os.environ) -> Path:
    """Where models of the hub are kept."""
    home = variables.get("HF_HOME") or Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(variables.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def disks() -> Iterator[Finding]:
    """Free space where models and runs go, and the memory that the loader's workers share."""
    cache = hub_cache()
    for what, folder in {f"the hub's cache, {cache}": cache, "this folder": Path.cwd()}.items():
        there = next(parent for parent in [folder, *folder.parents] if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{what}: {free / _GB:,.0f} GB free"
        if not os.access(there, os.W_OK):
            yield Finding("disks", Level.warning, f"{text}, but it cannot be written", "choose another, or set HF_HOME")
        elif free < _DISK_BYTES:
            yield Finding("disks", Level.warning, f"{text}; a 7B model takes 14 GB", "set HF_HOME, or `output:`")
        else:
            yield Finding("disks", Level.ok, text)
    try:
        tempfile.gettempdir()
    except OSError:
        text = "no temporary folder can be written, which PyTorch and others need"
        yield Finding("disks", Level.broken, text, "make room in /tmp, or set TMPDIR to a folder that has some")
    shared = Path("/dev/shm")
    if shared.is_dir() and (total := shutil.disk_usage(shared).total) < _SHM_BYTES:
        text = f"/dev/shm has {total / _GB:.2f} GB, through which the loader's workers send pictures"
        yield Finding("disks", Level.warning, text, "docker run --shm-size 8g, or loader.workers: 0")


def drivers() -> list[str]:
    """For each GPU that nvidia-smi sees, the version of the driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):  # it is there without a driver, or hangs
        return []


def hub(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Whether models can be fetched. That they cannot is no fault: parts and data may lie on disk."""
    address = variables.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urlsplit(address).hostname
    if variables.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", Level.note, "HF_HUB_OFFLINE is set: models and data sets come from the cache alone")
        return
    answers: list[str] = []
    asker = threading.Thread(target=lambda: answers.append(_ask(address)), daemon=True)
    asker.start()
    asker.join(HUB_TIMEOUT_S)  # a look-up of the name knows no time-out
    answer = answers[0] if answers else f"no answer in {HUB_TIMEOUT_S:.0f} s"
    if answer:
        mend = "name folders in stage files, or set HTTPS_PROXY or HF_ENDPOINT"
        yield Finding("hub", Level.note, f"{host} cannot be reached: {answer}", mend)
    else:
        yield Finding("hub", Level.ok, f"{host} answers")


def _ask(address: str) -> str:
    """Why an address does not answer, "" when it does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
