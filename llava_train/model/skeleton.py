"""A model without weights, which computes shapes: to find what a run would hold in memory before there is one.

A skeleton has the layers, adapters and frozen parts of the real model on the `meta` device. `imitation` gives its
parameters fake storage, so that its forward and backward pass run every operator for the shapes of its results alone
(torch's FakeTensorMode). Attention can be imitated as CUDA computes it, on a machine without one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from llava_train.config import ModelSection, RandomLanguageModel, TrainableSection
from llava_train.devices import cast_parameters
from llava_train.failures import cannot_load
from llava_train.model.attention import PACKED, Documents, attend_by_document, attend_with_torch
from llava_train.model.build import VOCABULARY_MULTIPLE, joined_config
from llava_train.model.compatibility import BuildError
from llava_train.model.processor import Front, config_from
from llava_train.model.trainable import set_trainable

_LIKE_CUDA = "packed_like_cuda"


def config_without_weights(section: ModelSection, front: Front) -> LlavaConfig:
    """The configuration that `build.build_llava` would give a model, from the parts' config.json alone.

    Raises BuildError.
    """
    part, n_tokens = section.language_model, len(front.tokenizer)
    text: PreTrainedConfig
    if isinstance(part, RandomLanguageModel):
        text = config_from(part.config, "language_model")
        text.vocab_size = max(n_tokens - 1, part.config.get("vocab_size", 0))
    else:
        try:
            text = AutoConfig.from_pretrained(part)
        except (OSError, ValueError) as error:
            raise BuildError(cannot_load("model.language_model", part, error)) from error
    if n_tokens > text.vocab_size:
        text.vocab_size = -(-n_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return joined_config(section, front, text, front.vision_config)


def skeleton(
    config: LlavaConfig, trainable: TrainableSection, dtype: torch.dtype, n_layers: int | None = None
) -> LlavaForConditionalGeneration:
    """The model of a stage on the `meta` device, frozen and unfrozen as it trains, in training mode.

    Args:
        n_layers: leave the language model its first layers only.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(copy.deepcopy(config))
        language_model = model.model.language_model
        if n_layers is not None:
            language_model.layers = language_model.layers[:n_layers]
            language_model.config.num_hidden_layers = n_layers
        cast_parameters(model, dtype)
        set_trainable(model, trainable)
    language_model.set_attn_implementation(PACKED)
    model.train()
    model.model.vision_tower.train(trainable.vision_tower is not None)
    return model


@contextmanager
def imitation(model: LlavaForConditionalGeneration, like_cuda: bool) -> Iterator[None]:
    """Tensors made inside have shapes and sizes and no content, and `model`, a skeleton, computes with such."""
    if like_cuda:
        model.model.language_model.set_attn_implementation(_LIKE_CUDA)
    with FakeTensorMode():
        _fake(model)
        yield


def _fake(model: nn.Module) -> None:
    """Gives the parameters and buffers of a skeleton fake storage; tied ones keep sharing theirs."""
    made: dict[torch.Tensor, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _packed_like_cuda(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if query.dtype not in (torch.bfloat16, torch.float16):
        return attend_by_document(query, key, value, documents.lengths, scaling, sliding_window, like_cuda=True), None
    longest = max(documents.lengths)
    return attend_with_torch()(query, key, value, documents.borders, longest, scaling, sliding_window), None


AttentionInterface.register(_LIKE_CUDA, _packed_like_cuda)
