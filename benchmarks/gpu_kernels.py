"""What runs on the device: its kernels and its idle time, attention by backend, the encoder compiled and not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from mix665k import draw_samples
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from llava_train.model import attention
from llava_train.model.attention import attend_by_document

_N_TOP = 15


def seconds_of(call: Callable[[], Any], cuda: bool, repeat: int = 10) -> float:
    """Seconds of `call`, the mean of `repeat` after two; waits for the device once."""
    for _ in range(2):
        call()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeat


def profile(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The kernels that take most of a call, and the share of it in which the device is idle."""
    cuda = device.type == "cuda"
    # Of the device alone: to record what the CPU does would slow it down, and leave the device idle.
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        averages = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
        spent = {event.key: event.self_cpu_time_total for event in averages}
        return {"top": _top(spent)}
    events = [
        event
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    kernels: Counter[str] = Counter()
    for event in events:
        kernels[event.name] += event.time_range.end - event.time_range.start
    whole_us = max(end for _, end in spans) - spans[0][0]
    return {"ms": whole_us / 1000, "idle": 1 - covered(spans) / whole_us, "n": len(events), "top": _top(kernels)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans, which are sorted: (0, 2), (1, 3), (5, 6) cover 4."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _top(spent: dict[str, float]) -> dict[str, float]:
    """Shares of those that take most."""
    whole = sum(spent.values()) or 1.0
    largest = sorted(spent, key=lambda name: -spent[name])[:_N_TOP]
    return {name[:100]: round(spent[name] / whole, 4) for name in largest}


def unique_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _backends(cuda: bool) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """Functions of (query, key, value, borders, lengths), by name."""
    yield "by document", lambda q, k, v, borders, lengths: attend_by_document(q, k, v, lengths, None)
    if not cuda:
        return
    kernels = {"torch varlen": attention.attend_with_torch()}
    if find_spec("flash_attn"):
        kernels["flash-attn"] = attention.varlen_kernel()
    for name, kernel in kernels.items():

        def attend(q: Any, k: Any, v: Any, borders: Any, lengths: Any, kernel: Any = kernel) -> torch.Tensor:
            return kernel(q, k, v, borders, max(lengths), None, None)

        yield name, attend


def attention_backends(device: torch.device, heads: int, head_size: int, n_tokens: int) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of attention, forward and with backward, over a pack of mix665k's documents."""
    cuda = device.type == "cuda"
    lengths: list[int] = []
    for sample in draw_samples(10_000, 0, max_tokens=min(2048, n_tokens // 4), n_image_tokens=min(576, n_tokens // 8)):
        if sum(lengths) + sample.n_tokens > n_tokens:
            break
        lengths.append(sample.n_tokens)
    borders = torch.tensor([sum(lengths[:number]) for number in range(len(lengths) + 1)], dtype=torch.int32)
    borders = borders.to(device)
    shape = (1, heads, sum(lengths), head_size)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    weights = torch.randn(1, sum(lengths), heads, head_size, device=device, dtype=torch.bfloat16)
    forward_flops = 4 * heads * head_size * sum(length * (length + 1) // 2 for length in lengths)
    found: dict[str, Any] = {"lengths": lengths}
    for name, attend in _backends(cuda):

        def forward(attend: Callable[..., torch.Tensor] = attend) -> torch.Tensor:
            return attend(query, key, value, borders, tuple(lengths))

        def both() -> None:
            forward().backward(weights)

        seconds, both_seconds = seconds_of(forward, cuda), seconds_of(both, cuda)
        found[name] = {
            "forward_ms": 1000 * seconds,
            "both_ms": 1000 * both_seconds,
            "forward_tflops": forward_flops / seconds / 1e12,
            "both_tflops": 3 * forward_flops / both_seconds / 1e12,
        }
    return found


@torch.no_grad()
def encoder_speed(model: LlavaForConditionalGeneration, n_images: int, cuda: bool) -> dict[str, Any]:
    """Pictures a second through all layers of the vision tower, by PyTorch and, on CUDA, with its layers compiled."""
    tower, side = model.model.vision_tower, model.config.vision_config.image_size
    pixels = torch.randn(n_images, 3, side, side, dtype=model.dtype, device=model.device)
    with FlopCounterMode(display=False) as counter:
        tower(pixels[:1])
    flops = counter.get_total_flops()
    found: dict[str, Any] = {"flops_of_an_image": flops}
    for how in ("eager", "compiled")[: 1 + cuda]:
        if how == "compiled":
            for layer in next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)):
                layer.compile()
        seconds = seconds_of(lambda: tower(pixels, output_hidden_states=True), cuda, 5)
        found[how] = {"images_per_s": n_images / seconds, "tflops": flops * n_images / seconds / 1e12}
    return found
