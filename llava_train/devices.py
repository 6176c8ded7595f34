"""Which device a model runs on, and in which precision."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from llava_train.errors import UserError
from llava_train.failures import explain
from llava_train.failures.machine import no_cuda
from llava_train.failures.words import Explanation, first_lines

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OTHER_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

_AMPERE = (8, 0)
"""The least compute capability of flash attention's kernels, in torch (`varlen_attn`) and in flash-attn 2."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEEP = ((_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**28), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1))
"""Settings of glibc's mallopt(3): nothing is given back, all comes from one heap, which grows by 256 MiB."""


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise UserError(f"device {name!r} is not known; choose auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        why = "" if torch.cuda.is_available() else f"\n{why_no_cuda(os.environ)}"
        raise UserError(
            f"device {name}: torch sees {seen} CUDA device{'s' * (seen != 1)} here; choose cpu or auto{why}"
        )
    return device


def training_device() -> torch.device:
    """A GPU, or a CPU where there is none, or where the user hides it.

    Raises:
        UserError: there is a GPU, and torch cannot use it: on the CPU a run would take months, and say nothing.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if has_gpu() and not hides_gpus(os.environ):
        raise UserError(
            f"{why_no_cuda(os.environ)}\nOr set CUDA_VISIBLE_DEVICES to nothing, to train on the CPU all the same."
        )
    return torch.device("cpu")


def why_no_cuda(environment: Mapping[str, str]) -> Explanation:
    """Why torch has no CUDA device here, as torch itself says it, and what to do."""
    if hides_gpus(environment):
        value = environment["CUDA_VISIBLE_DEVICES"]
        return no_cuda(f"CUDA_VISIBLE_DEVICES is {value!r}, which hides every GPU", "Unset it, or name GPUs: 0,1")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if explained := explain(error):
            return explained
        return no_cuda(first_lines(error, 1), "See what `nvidia-smi` says")
    return no_cuda("no GPU is visible", "See that `nvidia-smi` lists one")


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether the user, or a scheduler, hides all GPUs."""
    return environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU, whatever torch makes of it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def pick_dtype(name: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of a name; `auto` is the stored one, but float32 where that is slow. Raises UserError."""
    name = str(name).removeprefix("torch.")
    name = _OTHER_NAMES.get(name, name)
    if name == "auto":
        slow = stored == torch.float16 or (stored == torch.bfloat16 and imitates_bf16(device))
        return torch.float32 if device.type == "cpu" and slow else stored
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Changes the dtype of the weights alone: buffers such as rotary frequencies stay in float32, as when loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def imitates_bf16(device: torch.device) -> bool:
    """Whether a device is a CPU without instructions for bf16: it is tens of times slower there than fp32."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def without_bf16_attention(device: torch.device) -> str | None:
    """Returns the name of a GPU older than Ampere, for which no attention kernel computes in bf16; None for others."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _AMPERE:
        return None
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def keep_freed_memory() -> None:
    """Lets this process keep the memory that its tensors on a CPU free, where the C library is glibc.

    A step asks for what the step before gave back, and each page that the system hands out anew costs a fault: a sixth
    of the time of a step with `configs/small`'s parts.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for setting, value in _KEEP:
            mallopt(setting, value)
