"""The schema of metrics.jsonl: its two kinds of lines. docs/metrics.md explains them; `StepLine.model_json_schema()`
gives the same to machines. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llava_train.train.histograms import N_FILLS, N_LENGTHS


def _in(unit: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"unit": unit}, **limits)


Seconds = Annotated[float, _in("s")]
PerSecond = Annotated[float, _in("1/s")]
Share = Annotated[float, _in("0 to 1")]
Nats = Annotated[float | None, _in("nats")]
Samples = Annotated[int, _in("samples")]


class Line(BaseModel):
    """Base of both: what is not known, or not finite, is null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    step: int
    """optimizer steps done"""
    time: Seconds
    """since 1970, when the line was written"""


class OfSource(BaseModel):
    """What a line says of one source of the mixture."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    loss: float | None
    n_supervised: int
    n_samples: int


class StepLine(Line):
    """Of the steps since the line before, the *window*, over all ranks."""

    loss: Nats
    """mean cross entropy of the supervised tokens of the last step"""
    grad_norm: float | None
    """of the last step, before clipping; null where it is not finite"""
    grad_norms: dict[str, float | None]
    """the same of each part that trains; their squares add up to its square"""
    lr: dict[str, float]
    """learning rate of each part that trains, in the last step"""
    n_supervised: Annotated[int, _in("tokens")]
    """supervised tokens of the last step"""
    sources: dict[str, OfSource]
    """by source: `loss` and `n_supervised` of the steps that were taken, `n_samples`"""
    n_bad: Samples
    """left out since the run began"""
    skipped_steps: Annotated[int, _in("steps")]
    """not taken since the run began, because loss or gradient was not finite"""
    step_s: Seconds
    """a step, on average"""
    time_left_s: Seconds
    """to the end of the stage at this pace"""
    samples_per_s: PerSecond
    """samples"""
    tokens_per_s: PerSecond
    """real tokens, image tokens among them; no padding"""
    text_tokens_per_s: PerSecond
    """the same without image tokens"""
    images_per_s: PerSecond
    """pictures"""
    padding_share: Share
    """tokens that teach nothing, of all that are computed (below)"""
    tflops_per_s: Annotated[float | None, _in("10¹² FLOP/s")]
    """model FLOPs **per device** (below); null for language models that are not counted"""
    mfu: Annotated[float | None, _in("0 to 1")]
    """`tflops_per_s` of the device's datasheet peak; null where that is not known"""
    data_wait_s: Seconds
    """a step waits for its batch"""
    data_wait_share: Share
    """the same, of the time of a step"""
    copy_share: Share
    """copies of batches to the device, of the time of a step"""
    forward_share: Share
    """forward passes, of the time of a step"""
    backward_share: Share
    """backward passes, what they compute again included"""
    optimizer_share: Share
    """what follows the backward pass: the sum of the gradients over ranks, norm, optimizer, gathered weights"""
    evaluation_s: Seconds
    """evaluations since the line before; no part of `step_s`"""
    checkpoint_s: Seconds
    """checkpoints since the line before; no part of `step_s`"""
    peak_memory_bytes: Annotated[int, _in("bytes")]
    """largest of any rank: memory of tensors on a GPU, since the stage's first step began (its dry run not counted); \
resident memory of the process on a CPU"""
    sample_lengths: Annotated[list[int], _in("samples", min_length=N_LENGTHS, max_length=N_LENGTHS)]
    """by their tokens, in 32 bins up to `batch.max_sample_tokens`: bin `i` has `i w < n <= (i + 1) w`"""
    pack_fill: Annotated[list[int], _in("packs", min_length=N_FILLS, max_length=N_FILLS)]
    """by their tokens, in tenths of `batch.max_tokens`, as above"""


class EvaluationLine(Line):
    """Of an evaluation. Beside these keys, `eval_METRIC`, `eval_METRIC_low` and `eval_METRIC_high` of each score."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    eval_loss: Nats
    """mean cross entropy of the supervised tokens of the held-out samples"""
    eval_n_bad: Samples
    """held-out samples that it leaves out"""


def rows(kind: type[Line]) -> Iterator[tuple[str, str, str]]:
    """Key, unit and meaning of each field, as docs/metrics.md has them."""
    for key, field in kind.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        yield key, extra.get("unit", ""), field.description or ""
