"""A process of its own that imports torch and optional packages: a library that crashes takes only this one along.

    python -m llava_train.doctor.probe bitsandbytes gradio

prints a line of JSON about torch and its devices, and one for each module.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil

from llava_train.doctor.findings import Finding, Level
from llava_train.doctor.processes import Ended, run_python

_GIB = 2**30
_BF16_CAPABILITY = (8, 0)
_CUDA_TORCH = "install a build of torch for your CUDA driver: https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Probed:
    """What the process said before it ended."""

    torch: dict[str, Any] | None
    """version, cuda (of the build), devices [{name, bytes, capability}], cpu_bf16."""
    errors: dict[str, str | None]
    ended: Ended = field(default_factory=lambda: Ended(0, "", 0.0))


def probe(modules: list[str]) -> Probed:
    """Imports torch and modules elsewhere."""
    ended = run_python("llava_train.doctor.probe", modules, timeout_s=120)
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    about_torch = next((line["torch"] for line in lines if "torch" in line), None)
    errors: dict[str, str | None] = {line["module"]: line["error"] for line in lines if "module" in line}
    for module in modules if about_torch else []:  # without torch nothing was tried
        errors.setdefault(module, f"the process that tried ended: {ended.why}")
    return Probed(about_torch, errors, ended)


def devices(probed: Probed, drivers: list[str]) -> Iterator[Finding]:
    """The GPUs that torch can use, and the CPU.

    Args:
        drivers: for each GPU that nvidia-smi sees, the version of the driver.
    """
    if probed.torch is None:
        last = (probed.ended.output.strip().splitlines() or ["without a word"])[-1]
        yield Finding(
            "devices", Level.broken, f"torch cannot be imported: {last}", "pip install --force-reinstall torch"
        )
        return
    about = probed.torch
    build = f"CUDA {about['cuda']}" if about["cuda"] else "CPU"
    for number, device in enumerate(about["devices"]):
        capability = tuple(device["capability"])
        driver = f", driver {drivers[0]}" if drivers else ""
        text = f"GPU {number}: {device['name']}, {device['bytes'] / _GIB:.0f} GiB, compute capability "
        text += f"{capability[0]}.{capability[1]}{driver}; torch's build: {build}"
        if capability < _BF16_CAPABILITY:
            yield Finding("devices", Level.warning, f"{text}: no bf16", "set engine.precision: fp32")
        else:
            yield Finding("devices", Level.ok, text)
    if not about["devices"] and drivers and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        text = f"nvidia-smi sees {len(drivers)} GPUs (driver {drivers[0]}), torch's {build} build sees none"
        yield Finding("devices", Level.broken, text, _CUDA_TORCH)
    bf16 = "bf16 instructions" if about["cpu_bf16"] else "no bf16 instructions: engine.precision: fp32 there"
    memory = psutil.virtual_memory()
    text = f"CPU: {len(os.sched_getaffinity(0))} cores, {bf16}; {memory.available / _GIB:.0f} of "
    yield Finding("devices", Level.ok, f"{text}{memory.total / _GIB:.0f} GiB of memory free; torch's build: {build}")


def main(modules: list[str]) -> None:
    import torch

    from llava_train.devices import imitates_bf16

    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    gpus = [{"name": one.name, "bytes": one.total_memory, "capability": [one.major, one.minor]} for one in properties]
    cpu_bf16 = not imitates_bf16(torch.device("cpu"))
    about = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": gpus, "cpu_bf16": cpu_bf16}
    print(json.dumps({"torch": about}), flush=True)
    for module in modules:
        error = None
        try:
            importlib.import_module(module)
        except Exception as raised:  # whatever a broken package does
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        print(json.dumps({"module": module, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
