"""Weights that go into a model of the same shape, but for the rows that each vocabulary was given in addition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import LlavaForConditionalGeneration

from llava_train.model.trainable import part_of

Shapes = Mapping[str, tuple[int, ...]]

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_MOST_ADDED_ROWS = 128
"""Two vocabularies whose sizes differ by more are of two tokenizers: new tokens are few, padding goes to 64 rows."""


def misfits(ours: Shapes, theirs: Shapes, n_own_tokens: int = 0) -> Iterator[str]:
    """What keeps the tensors `theirs` from going into `ours`, a line for each tensor.

    The embeddings and the output layer may differ in their last rows, if `theirs` have the first `n_own_tokens`.
    """
    for name, shape in ours.items():
        if name not in theirs:
            yield f"{name} is missing there"
        elif shape != theirs[name]:
            n_ours, n_theirs = shape[0], theirs[name][0]
            near = n_own_tokens <= n_theirs and abs(n_ours - n_theirs) <= _MOST_ADDED_ROWS
            if not (near and shape[1:] == theirs[name][1:] and name.endswith(_VOCABULARY)):
                yield f"{name} is {list(theirs[name])} there and {list(shape)} here"
    yield from (f"{name} has no place here" for name in theirs if name not in ours)


@torch.no_grad()
def copy_weights(
    model: LlavaForConditionalGeneration, theirs: Mapping[str, torch.Tensor], image_token_id: int | None
) -> str | None:
    """Copies a whole LLaVA's tensors into a model, or says what does not fit, part by part, and copies nothing.

    Args:
        theirs: tensors under the names of `model.state_dict()`; vision tower left out to keep the model's own.
        image_token_id: of `<image>` in their vocabulary, None where it has none. Where it is another one than the
            model's, the model keeps its own row.
    """
    ours = model.state_dict()
    if not any(part_of(name) == "vision_tower" for name in theirs):
        ours = {name: tensor for name, tensor in ours.items() if part_of(name) != "vision_tower"}
    own_id = model.config.image_token_id
    problems = list(misfits(shapes_of(ours), shapes_of(theirs), own_id))
    if problems:
        by_part: dict[str, list[str]] = {}
        for problem in problems:
            by_part.setdefault(part_of(problem), []).append(problem)
        return "; ".join(
            f"{part}: {lines[0]}" + (f" (and {len(lines) - 1} more tensors)" if len(lines) > 1 else "")
            for part, lines in by_part.items()
        )
    for name, tensor in ours.items():
        if not name.endswith(_VOCABULARY):
            tensor.copy_(theirs[name])
            continue
        rows = torch.arange(min(len(tensor), len(theirs[name])))
        if image_token_id != own_id:
            rows = rows[rows != own_id]
        tensor[rows] = theirs[name][rows].to(tensor.dtype)
    return None


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
