"""What devices can do by their datasheets: dense products of bf16 matrices, summed in float32.

Datasheets of NVIDIA since Ampere print twice that, for matrices of which half is zero. A device whose figure was not
found is not here, and a run on it has no MFU: better none than a wrong one. Names are those that
`torch.cuda.get_device_name` gives, in full: an RTX 4090 D, a laptop's GPU and a slice of a GPU (MIG) are other devices.
"""

from __future__ import annotations

import re

import torch

_NVIDIA = "https://www.nvidia.com"
_PEAKS: tuple[tuple[str, float, str], ...] = (
    # name, TFLOP/s, source
    (r"NVIDIA A100(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)", 312.0, f"{_NVIDIA}/en-us/data-center/a100/"),
    # H100: whitepaper "NVIDIA H100 Tensor Core GPU Architecture", table 3; NVL: half of 1,671
    (r"NVIDIA H100 80GB HBM3", 989.4, "https://resources.nvidia.com/en-us-tensor-core"),
    (r"NVIDIA H100 PCIe", 756.0, "https://resources.nvidia.com/en-us-tensor-core"),
    (r"NVIDIA H100 NVL", 835.5, f"{_NVIDIA}/en-us/data-center/h100/"),
    # H200: half of 1,979; NVL: half of 1,671
    (r"NVIDIA H200", 989.5, f"{_NVIDIA}/en-us/data-center/h200/"),
    (r"NVIDIA H200 NVL", 835.5, f"{_NVIDIA}/en-us/data-center/h200/"),
    # its GPU is an H100 or H200 of SXM
    (
        r"NVIDIA GH200 (480GB|120GB|144G HBM3e)",
        989.5,
        "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip",
    ),
    (r"NVIDIA B200", 2250.0, "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"),
    (r"NVIDIA GB200", 2500.0, "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"),
    (r"NVIDIA L4", 121.0, f"{_NVIDIA}/en-us/data-center/l4/"),
    (r"NVIDIA L40", 181.05, f"{_NVIDIA}/en-us/data-center/l40/"),
    (r"NVIDIA L40S", 362.05, f"{_NVIDIA}/en-us/data-center/l40s/"),
    (r"NVIDIA A10", 125.0, f"{_NVIDIA}/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf"),
    (r"NVIDIA A40", 149.7, "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf"),
    # whitepaper "NVIDIA Ampere GA102 GPU Architecture": "Peak BF16 Tensor TFLOPS with FP32 Accumulate"
    (r"NVIDIA RTX A6000", 154.8, f"{_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"),
    (
        r"NVIDIA GeForce RTX 3090",
        71.0,
        f"{_NVIDIA}/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    # whitepaper "NVIDIA Ada GPU Architecture", appendix A, the same row
    (
        r"NVIDIA GeForce RTX 4090",
        165.2,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    # a quarter of 1,457, which is in FP8 and for sparse matrices
    (r"NVIDIA RTX 6000 Ada Generation", 364.25, f"{_NVIDIA}/en-us/design-visualization/rtx-6000/"),
    # whitepapers "NVIDIA RTX Blackwell GPU Architecture" and "RTX Blackwell PRO": the same row
    (
        r"NVIDIA GeForce RTX 5090",
        209.5,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
    (
        r"NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        503.8,
        f"{_NVIDIA}/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
        "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
    ),
    (r"AMD Instinct MI300X( OAM)?", 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    (r"AMD Instinct MI325X( OAM)?", 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device in dense bf16; None where no datasheet's figure is known."""
    matches = [tflops for name, tflops, _ in _PEAKS if re.fullmatch(name, device_name)]
    return matches[0] * 1e12 if matches else None


def peak_flops_of(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device in the precision of a run; None elsewhere than on a GPU in bf16."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name(device))
