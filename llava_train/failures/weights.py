"""Weights that do not fit, or are damaged."""

from __future__ import annotations

from llava_train.failures.words import Context, Explain, Explanation, is_a, shortened


def _misfit(error: BaseException, context: Context) -> Explanation | None:
    said = str(error)
    of_torch = "loading state_dict for" in said or "size mismatch for" in said or "ignore_mismatched_sizes" in said
    if not (of_torch and isinstance(error, RuntimeError)):
        return None
    return Explanation(
        f"its weights do not fit the model{context.during}",
        (
            first_misfit(error),
            "Name the parts and settings that the weights were made with, or others' weights;",
            "a run whose parts have changed begins anew under another name.",
        ),
        context.subject,
    )


def first_misfit(error: BaseException) -> str:
    """The first tensor that does not fit, of all that torch lists; or what else an error begins with."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    return shortened(next((line for line in lines if "size mismatch" in line or "in state_dict: " in line), lines[0]))


def _damaged(error: BaseException, context: Context) -> Explanation | None:
    if not is_a(error, "safetensors.SafetensorError"):
        return None
    return Explanation(
        f"a file of weights is damaged or incomplete ({shortened(str(error), 120)})",
        ("Copy it, or download it, again: `hf download NAME --force-download` replaces what the cache holds.",),
        context.subject,
    )


KNOWN: tuple[Explain, ...] = (_misfit, _damaged)
