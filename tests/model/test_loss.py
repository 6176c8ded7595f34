from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_train.data.chat import IGNORED
from llava_train.data.feature_cache import FeatureCache
from llava_train.model import cpu_attention, loss
from llava_train.model.features import encode, feature_shape
from llava_train.model.loss import PackedLoss, summed_cross_entropy
from tests.tiny import dataset_of, tiny_llava, write_data


def loss_of(llava, batch) -> torch.Tensor:
    names = ["input_ids", "position_ids", "pixel_values", "n_images", "cu_seqlens", "lengths", "predictors", "targets"]
    return PackedLoss(llava.model)(**{name: getattr(batch, name) for name in [*names, "features"]})[0]


def test_the_loss_of_a_pack_is_the_sum_over_its_documents_of_transformers_own(tmp_path: Path) -> None:
    llava = tiny_llava()
    data = write_data(tmp_path, 4)
    (pack,) = dataset_of(llava, data, seed=None, batch_size=4)[0].micro_batches
    packed = loss_of(llava, pack)
    llava.model.model.language_model.set_attn_implementation("sdpa")
    expected = 0.0
    singles = dataset_of(llava, data, seed=None, batch_size=1)
    for i in range(4):
        (single,) = singles[i].micro_batches
        output = llava.model(
            input_ids=single.input_ids,
            pixel_values=single.pixel_values if single.n_images else None,
            labels=single.labels,
        )
        expected += output.loss.item() * single.n_supervised
    assert packed.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text_only", [False, True])
def test_the_gradient_of_a_pack_is_that_of_its_documents_in_plain_transformers(text_only: bool, tmp_path: Path) -> None:
    llava = tiny_llava()
    data = write_data(tmp_path, 4, text_only=text_only)
    (pack,) = dataset_of(llava, data, seed=None, batch_size=4)[0].micro_batches
    loss_of(llava, pack).backward()
    packed = {name: parameter.grad for name, parameter in llava.model.named_parameters()}
    plain = tiny_llava()
    plain.model.model.language_model.set_attn_implementation("sdpa")
    singles = dataset_of(plain, data, seed=None, batch_size=1)
    for i in range(4):
        (single,) = singles[i].micro_batches
        pixels = single.pixel_values if single.n_images else None
        loss = plain.model(input_ids=single.input_ids, pixel_values=pixels, labels=single.labels).loss
        (loss * single.n_supervised).backward()
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is None:  # without an image the plain model leaves the projector out
            assert packed[name] is None or not packed[name].any(), name
        else:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_pack_without_images_gives_the_projector_a_gradient_of_zero(tmp_path: Path) -> None:
    llava = tiny_llava()
    (pack,) = dataset_of(llava, write_data(tmp_path, 3, text_only=True), batch_size=3)[0].micro_batches
    assert pack.n_images == 0
    loss_of(llava, pack).backward()
    gradients = [parameter.grad for parameter in llava.model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@torch.no_grad()
def test_features_of_pictures_give_the_same_loss_as_pixels_bit_for_bit(tmp_path: Path) -> None:
    llava = tiny_llava()
    (pack,) = dataset_of(llava, write_data(tmp_path, 6))[0].micro_batches
    assert pack.n_images
    read = replace(pack, pixel_values=None, features=encode(llava.model, pack.pixel_values))
    assert torch.equal(loss_of(llava, read), loss_of(llava, pack))


def test_a_pack_without_images_gives_the_projector_a_gradient_of_zero_with_features_too(tmp_path: Path) -> None:
    llava = tiny_llava()
    cache = FeatureCache(tmp_path, feature_shape(llava), torch.float32)
    data = write_data(tmp_path, 3, text_only=True)
    (pack,) = dataset_of(llava, data, batch_size=3, features=cache)[0].micro_batches
    assert (pack.n_images, pack.pixel_values, pack.features.shape) == (0, None, (1, *feature_shape(llava)))
    loss_of(llava, pack).backward()
    gradients = [parameter.grad for parameter in llava.model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_no_document_is_asked_for_its_first_token(tmp_path: Path) -> None:
    llava = tiny_llava()
    (pack,) = dataset_of(llava, write_data(tmp_path, 6))[0].micro_batches
    starts = pack.cu_seqlens[:-1].long()
    assert (pack.labels[0, starts] == IGNORED).all()
    assert not set((pack.predictors + 1).tolist()) & set(starts.tolist())
    assert torch.equal(pack.targets, pack.labels[0][pack.labels[0] != IGNORED])


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy_however_many_rows_at_once(
    trained: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "rows_at_once", lambda *_: rows)
    hidden, head, targets = torch.randn(10, 8), torch.randn(30, 8), torch.randint(30, (10,))
    hidden.requires_grad_(trained != "head")
    head.requires_grad_(trained != "hidden")
    wanted = [tensor for tensor in (hidden, head) if tensor.requires_grad]
    total, each = summed_cross_entropy(hidden, head, targets, 0.25)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(total, expected.sum() * 0.25)
    assert not each.requires_grad
    ours = torch.autograd.grad(total * 3, wanted)
    theirs = torch.autograd.grad(expected.sum() * 0.75, wanted)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n_targets", [0, 1, 31, 32, 33, 70])
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_rows_that_are_computed_to_have_few_sizes_change_no_loss_and_no_gradient(
    trained: str, n_targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "FEW_LOGITS_BYTES", 4 * 30 * 32)
    hidden, head, targets = torch.randn(n_targets, 8), torch.randn(30, 8), torch.randint(30, (n_targets,))
    hidden.requires_grad_(trained != "head")
    head.requires_grad_(trained != "hidden")
    wanted = [tensor for tensor in (hidden, head) if tensor.requires_grad]
    found = []
    for few_sizes in (False, True):
        with _Products() as products:
            total, each = summed_cross_entropy(hidden, head, targets, 0.25, few_sizes)
        found.append([total, each, *torch.autograd.grad(total * 3, wanted)])
    torch.testing.assert_close(*found)
    assert all(32 in shape for shape in products.shapes)


def test_a_filled_pack_has_the_loss_and_the_gradient_of_the_bare_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs, attention and logits at few sizes together, as a CPU computes bf16."""
    data, found = write_data(tmp_path, 6), []
    for few_sizes in (False, True):
        for module in (loss, cpu_attention):
            monkeypatch.setattr(module, "compiles_each_shape", lambda *_, few=few_sizes: few)
        llava = tiny_llava()
        (pack,) = dataset_of(llava, data, few_sizes=few_sizes)[0].micro_batches
        total, each = PackedLoss(llava.model)(**pack.model_inputs())
        total.backward()
        found.append({name: parameter.grad for name, parameter in llava.model.named_parameters()})
        found[-1] |= {"loss": total, "losses": each}
    assert pack.input_ids.numel() % 32 == 0
    torch.testing.assert_close(*found)


def test_a_loss_that_is_not_finite_makes_its_gradient_so() -> None:
    hidden = torch.full((2, 4), torch.inf, requires_grad=True)
    total, _ = summed_cross_entropy(hidden, torch.randn(6, 4), torch.tensor([0, 1]))
    total.backward()
    assert not total.isfinite() and not hidden.grad.isfinite().any()


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


class _Products(TorchDispatchMode):
    number = 0

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        """Of the first factor of each product."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function == torch.ops.aten.mm.default
        if function == torch.ops.aten.mm.default:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


def test_no_more_logits_are_held_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 5 * 1000)
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8)
    with _Largest() as largest:
        summed_cross_entropy(hidden, head, torch.randint(1000, (64,)))[0].backward()
    assert largest.numel == head.numel(), "the head is the largest tensor, not the 64 x 1000 logits"
    assert loss.rows_at_once(1000) == 5


def test_without_gradients_none_are_computed() -> None:
    head = torch.randn(1000, 8, requires_grad=True)
    with torch.no_grad(), _Products() as products:
        summed_cross_entropy(torch.randn(2, 8), head, torch.tensor([1, 2]))
    assert products.number == 1
