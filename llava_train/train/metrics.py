"""Model FLOPs: what the mathematics of a step needs, whatever computes it. docs/metrics.md has the convention.

Only matrix products count, a multiplication and an addition being two FLOPs.

    a row through a linear layer [in, out]   2 in out   forward
                                           + 2 in out   where a gradient flows into its input
                                           + 2 in out   where its weight trains
    a pair of query and key that see each    4 w        forward: a score, and its share of a value
    other, in a layer of attention that    + 8 w        backward: of values, scores, queries and keys
    is w = heads x head size wide

Nothing is counted for what is computed twice (activation checkpointing, the scores in a fused kernel's backward pass),
for padding, for documents that teach nothing, and for the vision tower above the layer whose features are used, though
transformers computes it.
"""

from __future__ import annotations

import math
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from llava_train.data.loader import PackedBatch
from llava_train.model.trainable import is_linear, part_module
from llava_train.train.histograms import N_FILLS, N_LENGTHS, Histograms, counts_in_bins

_OUTPUT_PROJECTIONS = {"o_proj", "out_proj", "dense", "c_proj", "wo"}
"""What transformers calls the last layer of an attention: all others there read what the whole layer reads."""


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of a pack, forward and backward."""

    encoder: int
    """Vision tower, its attention included."""
    projector: int
    linear: int
    """Linear layers of the language model, adapters included."""
    attention: int
    """Of the language model."""
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of training a model, forward and backward, by what they grow with."""

    encoder: int
    """An image."""
    projector: int
    """An image."""
    linear: int
    """A token."""
    head: int
    """A supervised token."""
    attention: tuple[tuple[int | None, int], ...]
    """A pair of query and key: (sliding window or None, FLOPs in all layers with that window)."""

    def of_pack(self, lengths: Sequence[int], n_images: int, n_supervised: int) -> PackFlops:
        """FLOPs of one pack.

        Args:
            lengths: tokens of each document.
        """
        return PackFlops(
            encoder=self.encoder * n_images,
            projector=self.projector * n_images,
            linear=self.linear * sum(lengths),
            attention=sum(
                flops * sum(n_pairs(length, window) for length in lengths) for window, flops in self.attention
            ),
            head=self.head * n_supervised,
        )


def n_pairs(length: int, window: int | None = None) -> int:
    """Pairs of tokens of a document in which the second sees the first: of 4 tokens 10, in a window of 2 seven."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def model_flops(
    model: LlavaForConditionalGeneration, n_image_tokens: int, cached_features: bool = False
) -> ModelFlops | None:
    """Counts a model whose parts are frozen or train as they will. Call it before DeepSpeed partitions the parameters.

    Args:
        n_image_tokens: that an image takes in the language model.
        cached_features: the vision tower does not run; its features are read from disk.

    Returns:
        None for a language model whose products are not all linear layers and attention (experts, for one).
    """
    decoder: Any = part_module(model, "language_model")
    windows = _windows(decoder.config)
    if windows is None or not _only_linear_layers(decoder):
        return None
    projector: Any = part_module(model, "projector")
    tower_trains = _trains(part_module(model, "vision_tower"))
    projector_flops = _linear(projector.linear_1, flows=tower_trains)
    if not is_linear(model):  # else the second layer is an identity
        projector_flops += _linear(projector.linear_2, flows=tower_trains or _trains(projector.linear_1))
    below_trains = tower_trains or _trains(projector) or _trains(model.get_input_embeddings())
    pair = 12 * decoder.config.num_attention_heads * _head_size(decoder.config)
    return ModelFlops(
        encoder=0 if cached_features else _encoder(model, n_image_tokens),
        projector=n_image_tokens * projector_flops,
        linear=sum(_linear(layer, flows) for layer, flows in _decoder_layers(decoder, below_trains)),
        head=_linear(model.lm_head, flows=True),
        attention=tuple((window, pair * n_layers) for window, n_layers in Counter(windows).items()),
    )


def _linear(layer: nn.Linear, flows: bool) -> int:
    """FLOPs of a row through a linear layer; `flows` if its input needs a gradient."""
    return 2 * layer.in_features * layer.out_features * (1 + flows + layer.weight.requires_grad)


def _encoder(model: LlavaForConditionalGeneration, n_image_tokens: int) -> int:
    """FLOPs of an image in the layers of the vision tower below the features."""
    tower: Any = part_module(model, "vision_tower")
    config, trains = tower.config, _trains(tower)
    wanted = model.config.vision_feature_layer
    indices = [wanted] if isinstance(wanted, int) else wanted
    n_layers = max(index if index >= 0 else config.num_hidden_layers + 1 + index for index in indices)
    n_tokens = n_image_tokens + (model.config.vision_feature_select_strategy == "default")
    # Class and register tokens stand beside the patches, which make a square.
    n_patches = math.isqrt(n_tokens - getattr(config, "num_register_tokens", 0)) ** 2
    flops = sum(
        2 * n_patches * conv.weight.numel() * (1 + conv.weight.requires_grad)
        for conv in tower.modules()
        if isinstance(conv, nn.Conv2d)
    )
    for block in _blocks(tower)[1][:n_layers]:
        flops += n_tokens * sum(_linear(layer, trains) for layer in block.modules() if isinstance(layer, nn.Linear))
        flops += n_tokens**2 * config.hidden_size * (12 if trains else 4)
    return flops


def _decoder_layers(decoder: nn.Module, below_trains: bool) -> Iterator[tuple[nn.Linear, bool]]:
    """Linear layers of a language model, and whether a gradient flows into the input of each.

    It does, but for those that read the embeddings when nothing below trains.
    """
    first = f"{_blocks(decoder)[0]}.0."
    for name, layer in decoder.named_modules():
        if isinstance(layer, nn.Linear):
            parts = set(name.split("."))
            reads_embeddings = (
                name.startswith(first)
                and any("att" in part for part in parts)
                and not parts & {*_OUTPUT_PROJECTIONS, "lora_B"}  # the second of an adapter reads the first
            )
            yield layer, below_trains or not reads_embeddings


def _blocks(part: Any) -> tuple[str, nn.ModuleList]:
    """The layers of a transformer, and their name in it."""
    n_layers = part.config.num_hidden_layers
    return next(
        (name, module)
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    )


def _windows(config: PreTrainedConfig) -> list[int | None] | None:
    """The sliding window of each layer of a language model; None if one has another kind of attention."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    of_kinds = {"full_attention": None, "sliding_attention": window}
    return [of_kinds[kind] for kind in kinds] if set(kinds) <= of_kinds.keys() else None


def _only_linear_layers(decoder: Any) -> bool:
    """Whether every token meets every matrix of a language model, in a linear layer."""
    holders = (module for module in decoder.modules() if isinstance(module, nn.Linear | nn.Embedding))
    known = {id(parameter) for module in holders for parameter in module.parameters(recurse=False)}
    others = [parameter for parameter in decoder.parameters() if id(parameter) not in known and parameter.ndim > 1]
    return not others and getattr(decoder.config, "num_experts_per_tok", None) is None


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@dataclass(frozen=True)
class Yardstick:
    """What the steps of a run are measured by."""

    flops: ModelFlops | None = None
    """None where the model's FLOPs are not known."""
    peak_flops: float | None = None
    """FLOP/s of a device by its datasheet; None where it is not known."""
    n_image_tokens: int = 0
    """Tokens that an image takes in the language model."""
    image_token_id: int = -1
    max_sample_tokens: int = 2048
    max_tokens: int = 16384
    """In a pack."""

    def histograms(self, batch: PackedBatch) -> Histograms:
        """Lengths and fill of a pack that lies on the CPU; documents that teach nothing are no samples."""
        lengths = [n for n, teaches in zip(batch.lengths, _taught(batch).tolist(), strict=True) if teaches]
        fill = [sum(batch.lengths)] if lengths else []
        return Histograms(
            counts_in_bins(lengths, self.max_sample_tokens, N_LENGTHS), counts_in_bins(fill, self.max_tokens, N_FILLS)
        )

    def measure(self, batch: PackedBatch) -> PackWork:
        """What there was to do in a pack that lies on the CPU."""
        taught = _taught(batch)
        lengths = [length for length, counts in zip(batch.lengths, taught.tolist(), strict=True) if counts]
        n_images = batch.n_images
        if n_images and self.n_image_tokens and len(lengths) < len(batch.lengths):
            in_idle = ~taught.repeat_interleave(torch.tensor(batch.lengths))
            n_images -= int((batch.input_ids[0, in_idle] == self.image_token_id).sum()) // self.n_image_tokens
        flops = self.flops.of_pack(lengths, n_images, batch.n_supervised).total if self.flops else 0
        n_tokens = sum(lengths)
        return PackWork(
            n_tokens, n_tokens - n_images * self.n_image_tokens, sum(batch.lengths) - n_tokens, n_images, flops
        )


def _taught(batch: PackedBatch) -> torch.Tensor:
    """Whether each document of a pack has a supervised token: bool [D]."""
    documents = torch.bucketize(batch.predictors, batch.cu_seqlens[1:], right=True)
    return torch.bincount(documents, minlength=len(batch.lengths)).bool()


@dataclass(frozen=True)
class PackWork:
    """What there is to do in packs.

    A document without a supervised token moves no weight: the one of a rank that has no sample, and a sample
    whose image could not be read. It is `padding`, and counts nowhere else.
    """

    n_tokens: int = 0
    """Image tokens included."""
    n_text_tokens: int = 0
    n_padding_tokens: int = 0
    n_images: int = 0
    flops: int = 0

    def __add__(self, other: PackWork) -> PackWork:
        return PackWork(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def reset_peak_memory() -> None:
    """Begins to look for the peak anew. On a CPU the peak is the process's, and stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use at once: of tensors on a GPU, since training began; of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
