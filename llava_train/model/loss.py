"""The forward pass of a pack: the cross entropy of its supervised tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration


class PackedLoss(nn.Module):
    """Runs a LLaVA model over one pack. What DeepSpeed wraps.

    It does what `LlavaForConditionalGeneration.forward` does, less what a pack does not need (a mask, logits of
    positions that are not supervised, checks that stall the device), and it touches the projector even when the
    pack has no image: a rank whose graph lacks a trainable part hangs ZeRO.
    """

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, *, predictors: torch.Tensor, targets: torch.Tensor, **pack: Any) -> torch.Tensor:
        """Cross entropy of each target: float32 [S]. Arguments as the fields of `data.loader.PackedBatch`."""
        hidden = self.hidden_states(**pack)
        logits = self.llava.lm_head(hidden[0, predictors])  # [S, vocabulary]
        return cross_entropy(logits.float(), targets, reduction="none")

    def hidden_states(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        n_images: int,
        cu_seqlens: torch.Tensor,
        lengths: tuple[int, ...],
    ) -> torch.Tensor:
        """Output of the language model's last layer: [1, T, hidden size]."""
        llava = self.llava
        pixel_values = pixel_values.to(llava.model.vision_tower.dtype)
        features = torch.cat(llava.get_image_features(pixel_values).pooler_output)  # [N * image tokens, hidden]
        embeddings = llava.get_input_embeddings()(input_ids)
        if n_images:
            is_image = (input_ids[0] == llava.config.image_token_id).byte()
            # Not by masked_scatter, nor by nonzero: the backward pass of one and the other itself wait for the device.
            positions = is_image.argsort(descending=True, stable=True)[: len(features)]
            embeddings = embeddings.index_copy(1, positions, features.to(embeddings.dtype)[None])
        else:
            embeddings = embeddings + features.sum() * 0
        return llava.model.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            document_lengths=lengths,
        ).last_hidden_state
