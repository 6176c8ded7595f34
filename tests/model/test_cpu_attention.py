"""Attention in blocks of queries equals PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_train.model import cpu_attention
from llava_train.onednn import next_size


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize(("n_heads", "n_groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_equal_pytorchs(length: int, n_heads: int, n_groups: int, scale: float | None) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (n_heads, n_groups, n_groups)]
    weights = torch.randn(1, n_heads, length, 16)
    ours = cpu_attention.attend(*tensors, scale)
    theirs = scaled_dot_product_attention(*tensors, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    of_ours = torch.autograd.grad((ours * weights).sum(), tensors)
    of_theirs = torch.autograd.grad((theirs * weights).sum(), tensors)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300, 1000])
def test_tokens_behind_the_last_change_nothing(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (6, 2, 2)]
    weights, found, computed = torch.randn(1, 6, length, 16), [], []
    original = cpu_attention.BlockAttention.apply
    monkeypatch.setattr(
        cpu_attention.BlockAttention, "apply", lambda *args: computed.append(args[0].shape[2]) or original(*args)
    )
    for few_sizes in (False, True):
        monkeypatch.setattr(cpu_attention, "compiles_each_shape", lambda *_, few=few_sizes: few)
        output = cpu_attention.attend(*tensors, None)
        found.append([output, *torch.autograd.grad((output * weights).sum(), tensors)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert computed == [length, next_size(length)]


def test_bf16_is_as_near_to_float32_as_pytorchs() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, 300, 64, requires_grad=True) for heads in (9, 3, 3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    weights = torch.randn(1, 9, 300, 64)

    def errors(attend) -> list[float]:
        found = attend(*rounded)
        gradients = torch.autograd.grad((found.float() * weights).sum(), rounded)
        return [((a.float() - b).norm() / b.norm()).item() for a, b in zip((found, *gradients), expected, strict=True)]

    output = scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected = (output, *torch.autograd.grad((output * weights).sum(), exact))
    ours = errors(lambda *tensors: cpu_attention.attend(*tensors, None))
    theirs = errors(lambda *tensors: scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))
    assert all(a < 1.5 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
