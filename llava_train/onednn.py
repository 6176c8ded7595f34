"""A few sizes for oneDNN, which computes bf16 on CPUs and compiles a kernel for each new shape of a matrix product.

A new shape costs 1 to 20 ms and about 1 MiB, and oneDNN keeps the last 1,024 kernels. Every pack has another number
of tokens, every document another length, every step another number of supervised tokens. Without care most shapes of a
step are new, and a run grows by gigabytes: by the kernels, and by the gaps between them, in which no large tensor fits.
So there these numbers are rounded up to a few sizes, and fewer kernels are kept. Products in float32 come from another
library, which compiles nothing.

    next_size(70) == 96    next_size(1500) == 1536    next_size(4000) == 4096    next_size(4000, most=4050) == 4050
"""

from __future__ import annotations

import os

import torch

_LEAST, _STEPS = 32, 16
"""Sizes are multiples of 32 up to 1,024; above, each power of two has 16 sizes up to the next."""
_CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
MOST_KERNELS = 512
"""Kernels that are kept. A step of SmolLM2-135M with LoRA uses 80 to 150, one of another number of tokens 30 others.
With fewer than a step uses, every layer would compile its kernels again: 64 cost 30% of the speed."""
_KERNEL_BYTES = 2 * 2**20
"""Memory of a kernel with AMX: 0.5 to 1.2 MiB for itself, and as much again for gaps between tensors that it leaves.
With three layers of SmolLM2-135M, 60 steps took 2.46 GiB, Python and its libraries (0.64) included; this says 2.55."""


def compiles_each_shape(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a matrix product of this dtype costs a compilation for each new shape."""
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def next_size(n: int, most: int | None = None) -> int:
    """Return the least of the few sizes that is at least `n`, or `most` where that is less. `n` may not exceed `most`.

    What is added is less than 32, or less than a 16th of `n`.
    """
    step = _step(n)
    size = -(-n // step) * step
    return size if most is None else min(size, most)


def _step(n: int) -> int:
    """Return the distance between the sizes around `n`: 32 up to 1,024, 64 up to 2,048."""
    return max(_LEAST, (1 << max(0, n - 1).bit_length()) // (2 * _STEPS))


def previous_size(n: int) -> int:
    """Return the greatest of the few sizes that is at most `n`; 32 where none is."""
    size = next_size(max(n, _LEAST))
    return size if size <= n or size == _LEAST else next_size(size - _step(size))


def limit_kernels() -> None:
    """Keep `MOST_KERNELS` kernels at most in this process, unless the environment says otherwise.

    oneDNN reads this once, before its first matrix product.
    """
    os.environ.setdefault(_CAPACITY, str(MOST_KERNELS))


def kernels_bytes() -> int:
    """Return the memory that compiled kernels take in this process when as many are kept as may be."""
    try:
        n_kernels = int(os.environ.get(_CAPACITY, MOST_KERNELS))
    except ValueError:
        n_kernels = MOST_KERNELS
    return max(0, n_kernels) * _KERNEL_BYTES
