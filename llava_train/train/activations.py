"""The memory that the forward and backward pass of a pack take, found by running them on shapes alone.

No formula by architecture: `skeleton` runs the very code of the model, the loss and activation checkpointing, and
every tensor that an operator returns is counted while it lives. Layers are alike, so two and three of them tell what
all take.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig

from llava_train.config import StageConfig
from llava_train.devices import DTYPES
from llava_train.model.loss import PackedLoss
from llava_train.model.recompute import Recompute, enable_recompute
from llava_train.model.skeleton import imitation, skeleton
from llava_train.train.heaviest import PackShape, imitate

_FEW, _ONE_MORE = 2, 3


class NotImitatedError(RuntimeError):
    """A model whose code asks for values, where there are only shapes."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return, as long as they live. `known` storages do not count."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*known.parameters(), *known.buffers())}
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, n_bytes = storage._cdata, storage.nbytes()
        if address in self._known or address in self._living:
            return

        def forget(_: Any) -> None:
            self.now -= n_bytes
            del self._living[address]

        self._living[address] = weakref.ref(storage, forget)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def activation_bytes(
    config: StageConfig, llava: LlavaConfig, pack: PackShape, recompute: Recompute, like_cuda: bool
) -> int:
    """The most bytes beside weights and their gradients that live during the forward and backward pass of a pack.

    Args:
        llava: the model's configuration.
        like_cuda: attention as CUDA computes it.

    Raises NotImitatedError.
    """
    n_layers = llava.text_config.num_hidden_layers
    if n_layers <= _ONE_MORE:
        return _tried(config, llava, pack, recompute, like_cuda, n_layers)
    few, one_more = (_tried(config, llava, pack, recompute, like_cuda, n) for n in (_FEW, _ONE_MORE))
    return few + (n_layers - _FEW) * (one_more - few)


def _tried(
    config: StageConfig, llava: LlavaConfig, pack: PackShape, recompute: Recompute, like_cuda: bool, n_layers: int
) -> int:
    with unimitated(llava):
        return _measured(config, llava, pack, recompute, like_cuda, n_layers)


@contextmanager
def unimitated(llava: LlavaConfig) -> Iterator[None]:
    """Whatever the code of a model raises inside, where it has no values, is a NotImitatedError.

    Whatever: the model may train all the same, and an estimate must neither end its run nor hide why it ended.
    """
    try:
        yield
    except Exception as error:
        kind, told = llava.text_config.model_type, str(error).partition("\n")[0]
        raise NotImitatedError(f"a {kind} cannot be run without values ({type(error).__name__}: {told})") from error


def _measured(
    config: StageConfig, llava: LlavaConfig, pack: PackShape, recompute: Recompute, like_cuda: bool, n_layers: int
) -> int:
    model = skeleton(llava, config.trainable, DTYPES[config.engine.precision], n_layers)
    parts = [model.model.language_model] + ([model.model.vision_tower] if config.trainable.vision_tower else [])
    for part in parts:
        enable_recompute(part, recompute)
    with imitation(model, like_cuda):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with LiveBytes(model) as live:
            batch = imitate(pack, llava.image_token_id, torch.device("cpu"))
            loss, _ = PackedLoss(model, like_cuda)(**batch.model_inputs())
            loss.backward()
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
