from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_train.data.chat import IGNORED
from llava_train.data.feature_cache import FeatureCache
from llava_train.model.features import encode, feature_shape
from llava_train.model.loss import PackedLoss
from tests.tiny import dataset_of, tiny_llava, write_data


def loss_of(llava, batch) -> torch.Tensor:
    names = ["input_ids", "position_ids", "pixel_values", "n_images", "cu_seqlens", "lengths", "predictors", "targets"]
    return PackedLoss(llava.model)(**{name: getattr(batch, name) for name in [*names, "features"]}).sum()


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
