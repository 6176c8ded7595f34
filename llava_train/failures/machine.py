"""Failures of the machine: its memory, its disk, its GPUs."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping

from llava_train.failures.words import Context, Explain, Explanation, first_lines, is_a, shortened

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _device_memory(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    by_library = isinstance(error, RuntimeError) and ("CUDA error: out of memory" in said or "_ALLOC_FAILED" in said)
    if not (by_library or is_a(error, "torch.OutOfMemoryError")):
        return None
    of_run = (
        "Lower batch.max_tokens, or set engine.activation_checkpointing: full; neither changes a result.",
        "`llava-train plan --config STAGE` tells what takes the memory, and what makes it fit.",
    )
    of_command = (
        "See by `nvidia-smi` who else uses the GPU; take --dtype bf16 or --quantize 4bit where the command has it,",
        "fewer --max-new-tokens or a smaller --batch-size; or --device cpu.",
    )
    return Explanation(
        f"the memory of the GPU ran out{context.during}",
        (f"PyTorch says: {shortened(said.split('. ')[0])}", *(of_run if context.is_run else of_command)),
    )


def _host_memory(error: BaseException, context: Context) -> Explanation | None:
    by_torch = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (by_torch or by_system or isinstance(error, MemoryError)):
        return None
    of_run = (
        "Lower loader.workers; engine.offload_optimizer and engine.offload_parameters take host memory, too.",
        "In a job, ask for more: llava-train slurm --sbatch-arg=--mem=200G.",
    )
    of_command = ("Close other programs, or lower --workers or --batch-size where the command has it.",)
    said = first_lines(error, 1).rpartition("DefaultCPUAllocator: ")[2]
    return Explanation(
        f"the memory of this machine ran out{context.during}",
        (f"The system says: {shortened(said)}", *(of_run if context.is_run else of_command)),
    )


def _worker(error: BaseException, context: Context) -> Explanation | None:
    found = re.match(r"DataLoader worker \(pid (\d+)\) is killed by signal: (\w+(?: \w+)?)", str(error))
    if found is None or not isinstance(error, RuntimeError):
        return None
    process, name = found[1], found[2]
    mend: tuple[str, ...]
    if name.startswith("Bus"):
        mend = (
            "It found no room in shared memory (/dev/shm). A container gets more by --shm-size=16g or --ipc=host.",
            "Or lower loader.workers.",
        )
    elif name == "Killed":
        mend = (
            "The system does so when a machine's memory, or a job's, runs out (`dmesg -T | grep -i oom` shows it).",
            "Lower loader.workers, or ask for more memory: llava-train slurm --sbatch-arg=--mem=200G.",
        )
    else:
        mend = ("--set loader.workers=0 reads the data in this process, whose error then tells more.",)
    return Explanation(f"a worker of the loader (process {process}) was ended by a signal: {name}", mend)


_CUDA: Mapping[str, tuple[str, str]] = {
    "not compiled with CUDA": (
        "this PyTorch was built without it",
        "Install a PyTorch with CUDA, as https://pytorch.org/get-started/locally says",
    ),
    "driver on your system is too old|driver version is insufficient": (
        "the NVIDIA driver is too old for this PyTorch",
        "Update the driver, or install a PyTorch of an older CUDA: https://pytorch.org/get-started/previous-versions",
    ),
    "Found no NVIDIA driver": ("there is no NVIDIA driver", "Install it, and see that `nvidia-smi` lists the GPUs"),
    "No CUDA GPUs are available|no CUDA-capable device": (
        "no GPU is visible",
        "See that `nvidia-smi` lists one, and that CUDA_VISIBLE_DEVICES or the job's request does not hide it",
    ),
    "invalid device ordinal": (
        "there is no GPU of that number",
        "Start no more processes than there are GPUs, or name another --device",
    ),
    "no kernel image is available": (
        "this PyTorch has no code for this GPU",
        "Install a PyTorch that knows it: https://pytorch.org/get-started/locally",
    ),
    "driver initialization failed|CUDA unknown error": (
        "its driver does not start",
        "See what `nvidia-smi` says; after an update of the driver, restart the machine",
    ),
}


def _cuda(error: BaseException, context: Context) -> Explanation | None:
    if isinstance(error, RuntimeError | AssertionError):
        for pattern, (what, mend) in _CUDA.items():
            if re.search(pattern, str(error)):
                return no_cuda(what, mend)
    return None


def no_cuda(what: str, mend: str) -> Explanation:
    return Explanation(f"CUDA cannot be used: {what}", (f"{mend}.", "`llava-train doctor` shows what PyTorch sees."))


def _no_room(error: BaseException, context: Context) -> Explanation | None:
    code, place = None, ""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        code, place = error.errno, str(error.filename or "")
    elif found := re.search(r"\(os error (\d+)\)", str(error)):  # of libraries in Rust: safetensors, tokenizers
        code = int(found[1]) if int(found[1]) in _NO_ROOM else None
    if code is None:
        return None
    causes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of this account is used up"}
    cause = causes.get(code, "a file is larger than the file system, or `ulimit -f`, allows")
    where = context.run_dir or place or "."
    mend = [f"Make room: `df -h {where}` shows how much there is."]
    if context.is_run:
        mend.append("A lower checkpoint.keep takes less; an `output:` on another disk takes the whole run there.")
    mend.append("HF_HOME moves what is downloaded from the hub to another disk, TMPDIR what is temporary.")
    return Explanation(f"{cause}{context.during}", tuple(mend), place)


KNOWN: tuple[Explain, ...] = (_device_memory, _host_memory, _worker, _cuda, _no_room)


def named_file(error: BaseException, context: Context) -> Explanation | None:
    """What the file system says of a file that it names."""
    if not (isinstance(error, OSError) and error.errno and error.filename):
        return None
    mends = {
        errno.EMFILE: "This process may open no more files: `ulimit -n 65536` lets it.",
        errno.EACCES: "Give this account the right to read or write it, or name another place.",
        errno.EROFS: "It can only be read: name another place.",
    }
    mend = mends.get(error.errno, "See that it is there, and that every machine of the run sees it.")
    return Explanation(f"{error.strerror}{context.during}", (mend,), os.fsdecode(str(error.filename)))
