"""The forward pass of a pack: the cross entropy of its supervised tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration

from llava_train.model.attention import Documents
from llava_train.model.features import encode, project
from llava_train.onednn import compiles_each_shape, next_size, previous_size

LOGITS_BYTES = 512 * 2**20
"""Logits that are held at once, in float32: 4,000 rows over Vicuna's vocabulary. With few, a trained head's gradient,
which is as large as the head, would be read and written too often."""
FEW_LOGITS_BYTES = 64 * 2**20
"""The same on a CPU in bf16, where it is as fast or faster: 320 rows over SmolLM2's vocabulary. All chunks but the last
have the same shape, and no gap in memory is as large as all logits."""


class PackedLoss(nn.Module):
    """Runs a LLaVA model over one pack. What DeepSpeed wraps.

    It does what `LlavaForConditionalGeneration.forward` does, less what a pack does not need (a mask, logits of
    positions that are not supervised, checks that stall the device), and it touches the projector even when the
    pack has no image: a rank whose graph lacks a trainable part hangs ZeRO.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, like_cuda: bool = False) -> None:
        """`like_cuda`: compute the loss as on a GPU, also where the model is on a CPU (estimates of a GPU's memory)."""
        super().__init__()
        self.llava, self.like_cuda = llava, like_cuda

    def forward(
        self, *, predictors: torch.Tensor, targets: torch.Tensor, scale: float = 1.0, **pack: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross entropy times `scale`, float32 [], and that of each target, float32 [S], without gradient.

        Other arguments as the fields of `data.loader.PackedBatch`.
        """
        hidden = self.hidden_states(**pack)
        few_sizes = not self.like_cuda and compiles_each_shape(hidden.device, hidden.dtype)
        return summed_cross_entropy(hidden[0, predictors], self.llava.lm_head.weight, targets, scale, few_sizes)

    def hidden_states(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        n_images: int,
        cu_seqlens: torch.Tensor,
        lengths: tuple[int, ...],
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output of the language model's last layer: [1, T, hidden size]. Of `features`, the tower is not asked."""
        llava = self.llava
        if features is None:
            assert pixel_values is not None
            features = encode(llava, pixel_values)
        images = project(llava, features)  # [N * image tokens, hidden]
        embeddings = llava.get_input_embeddings()(input_ids)
        if n_images:
            is_image = (input_ids[0] == llava.config.image_token_id).byte()
            # Not by masked_scatter, nor by nonzero: the backward pass of one and the other itself wait for the device.
            positions = is_image.argsort(descending=True, stable=True)[: len(images)]
            embeddings = embeddings.index_copy(1, positions, images.to(embeddings.dtype)[None])
        else:
            embeddings = embeddings + images.sum() * 0
        return llava.model.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            documents=Documents(cu_seqlens, lengths),
        ).last_hidden_state


def summed_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    scale: float = 1.0,
    few_sizes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of targets, a few rows of logits at a time.

    Args:
        hidden: [S, hidden size]; head: [vocabulary, hidden size]; targets: int64 [S].
        scale: of the sum. Given here, the gradient has it before it is rounded to the dtype of `hidden`.
        few_sizes: compute logits of a number of rows that is one of few, see `onednn`; the added ones count nothing.

    Returns:
        Their sum times `scale`, float32 [], and each one, float32 [S], which has no gradient.
    """
    if not torch.is_grad_enabled():
        head = head.detach()  # or its gradient would be computed all the same
    return _SummedCrossEntropy.apply(hidden, head, targets, scale, few_sizes)


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient of a sum is known as soon as the logits are, so it is computed with them and they are let go."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, scale: float, few_sizes: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n_targets, n_rows = len(targets), rows_at_once(len(head), few_sizes)
        if few_sizes:  # rows behind the last, which count nothing
            n_last = n_targets % n_rows
            n_added = next_size(n_last, n_rows) - n_last
            hidden, targets = pad(hidden, (0, 0, 0, n_added)), pad(targets, (0, n_added))
        needs_hidden, needs_head, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        for start in range(0, len(targets), n_rows):
            rows, wanted = hidden[start : start + n_rows], targets[start : start + n_rows, None]
            logits = (rows @ head.T).float()
            log_sums = logits.logsumexp(dim=1, keepdim=True)
            losses[start : start + n_rows] = (log_sums - logits.gather(1, wanted))[:, 0]
            if of_hidden is None and of_head is None:
                continue
            of_logits = logits.sub_(log_sums).exp_()
            of_logits.scatter_add_(1, wanted, torch.full_like(log_sums, -1.0))
            of_logits = of_logits.mul_(scale).to(hidden.dtype)
            if few_sizes:
                of_logits[max(0, n_targets - start) :] = 0
            if of_hidden is not None:
                torch.mm(of_logits, head, out=of_hidden[start : start + n_rows])
            if of_head is not None:
                of_head += of_logits.T @ rows
        losses = losses[:n_targets]
        ctx.save_for_backward(
            None if of_hidden is None else of_hidden[:n_targets], None if of_head is None else of_head.to(head.dtype)
        )
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_head = (tensor if tensor is None else tensor * gradients[0] for tensor in ctx.saved_tensors)
        return of_hidden, of_head, None, None, None


def rows_at_once(n_tokens: int, few_sizes: bool = False) -> int:
    """Rows of logits, each over a vocabulary of `n_tokens`, that are held at once."""
    if few_sizes:
        return previous_size(FEW_LOGITS_BYTES // (4 * n_tokens))
    return max(1, LOGITS_BYTES // (4 * n_tokens))
