"""What devices can do by their datasheets: dense matrix products, summed in float32.

The factors are in bf16, in float32, or in TF32: float32 rounded to 10 bits of mantissa, at half of bf16's peak on all
devices here. PyTorch multiplies float32 matrices in float32 unless it is told otherwise, and this package does not.

Datasheets of NVIDIA since Ampere print twice bf16's peak, for matrices of which half is zero. A device whose figures
were not found is not here, and a run on it has no MFU: better none than a wrong one. Names are those that
`torch.cuda.get_device_name` gives, in full: an RTX 4090 D, a laptop's GPU and a slice of a GPU (MIG) are other devices.
"""

from __future__ import annotations

import re
from typing import Literal

import torch

Precision = Literal["bf16", "tf32", "fp32"]

_NVIDIA = "https://www.nvidia.com"
_PEAKS: tuple[tuple[str, float, float, str], ...] = (
    # name, TFLOP/s in bf16, in float32 without tensor cores, source of both
    (r"NVIDIA A100(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)", 312.0, 19.5, f"{_NVIDIA}/en-us/data-center/a100/"),
    # H100: whitepaper "NVIDIA H100 Tensor Core GPU Architecture", table 3; NVL: half of 1,671
    (r"NVIDIA H100 80GB HBM3", 989.4, 66.9, "https://resources.nvidia.com/en-us-tensor-core"),
    (r"NVIDIA H100 PCIe", 756.0, 51.2, "https://resources.nvidia.com/en-us-tensor-core"),
    (r"NVIDIA H100 NVL", 835.5, 60.0, f"{_NVIDIA}/en-us/data-center/h100/"),
    # H200: half of 1,979; NVL: half of 1,671
    (r"NVIDIA H200", 989.5, 67.0, f"{_NVIDIA}/en-us/data-center/h200/"),
    (r"NVIDIA H200 NVL", 835.5, 60.0, f"{_NVIDIA}/en-us/data-center/h200/"),
    # its GPU is an H100 or H200 of SXM
    (
        r"NVIDIA GH200 (480GB|120GB|144G HBM3e)",
        989.5,
        67.0,
        "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip",
    ),
    (r"NVIDIA B200", 2250.0, 75.0, "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"),
    (r"NVIDIA GB200", 2500.0, 80.0, "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"),
    (r"NVIDIA L4", 121.0, 30.3, f"{_NVIDIA}/en-us/data-center/l4/"),
    (r"NVIDIA L40", 181.05, 90.5, f"{_NVIDIA}/en-us/data-center/l40/"),
    (r"NVIDIA L40S", 362.05, 91.6, f"{_NVIDIA}/en-us/data-center/l40s/"),
    (r"NVIDIA A10", 125.0, 31.2, f"{_NVIDIA}/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"),
    (
        r"NVIDIA A40",
        149.7,
        37.4,
        "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    ),
    # whitepaper "NVIDIA Ampere GA102 GPU Architecture": "Peak BF16 Tensor TFLOPS with FP32 Accumulate"
    (
        r"NVIDIA RTX A6000",
        154.8,
        38.7,
        f"{_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    (
        r"NVIDIA GeForce RTX 3090",
        71.0,
        35.6,
        f"{_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    # whitepaper "NVIDIA Ada GPU Architecture", appendix A, the same row
    (
        r"NVIDIA GeForce RTX 4090",
        165.2,
        82.6,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    # a quarter of 1,457, which is in FP8 and for sparse matrices
    (r"NVIDIA RTX 6000 Ada Generation", 364.25, 91.1, f"{_NVIDIA}/en-us/design-visualization/rtx-6000/"),
    # whitepapers "NVIDIA RTX Blackwell GPU Architecture" and "RTX Blackwell PRO": the same row
    (
        r"NVIDIA GeForce RTX 5090",
        209.5,
        104.8,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
    (
        r"NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        503.8,
        126.0,
        f"{_NVIDIA}/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
        "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
    ),
    (
        r"AMD Instinct MI300X( OAM)?",
        1307.4,
        163.4,
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
    (
        r"AMD Instinct MI325X( OAM)?",
        1307.4,
        163.4,
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html",
    ),
)


def peak_flops(device_name: str, precision: Precision = "bf16") -> float | None:
    """Dense FLOP/s of a device; None where no datasheet's figure is known."""
    matches = [
        {"bf16": bf16, "tf32": bf16 / 2, "fp32": fp32}[precision]
        for name, bf16, fp32, _ in _PEAKS
        if re.fullmatch(name, device_name)
    ]
    return matches[0] * 1e12 if matches else None


def multiplied_in(precision: Literal["bf16", "fp32"]) -> Precision:
    """The precision in which PyTorch multiplies the matrices of a stage on a GPU.

    It is TF32 for float32 where `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1` or `torch.set_float32_matmul_precision` says so.
    """
    return "tf32" if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32" else precision


def peak_flops_of(device: torch.device, precision: Literal["bf16", "fp32"]) -> float | None:
    """`peak_flops` of a device in the precision of a run; None elsewhere than on a GPU."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), multiplied_in(precision))
