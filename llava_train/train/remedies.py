"""What to change in a stage file so that it fits the memory: of some changes the first that is enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llava_train.config import StageConfig
from llava_train.model.recompute import RECOMPUTES, Recompute
from llava_train.stage_file import ConfigError, with_overrides
from llava_train.train.memory import Estimate, Estimator, gib

LORA = "trainable.language_model.lora={rank: 128, alpha: 256, dropout: 0.05}"
"""As LLaVA-1.5 has it; it wants ten times the learning rate."""


@dataclass(frozen=True)
class Remedy:
    """Changes that make a stage fit."""

    changes: tuple[str, ...]
    """`key=value`, as for `--set`."""
    estimate: Estimate

    def __str__(self) -> str:
        keys = " ".join(f"'{change}'" if " " in change else change for change in self.changes)
        return f"--set {keys} (then {gib(self.estimate.total_bytes)})"


def find_remedy(estimator: Estimator, config: StageConfig, recompute: Recompute, budget: int) -> Remedy | None:
    """The first changes after which a stage takes at most `budget` bytes on a device, None if none do.

    Args:
        recompute: what the stage does now, whatever it says.
    """
    n_tokens = estimator.pack(config).n_tokens
    for changes in candidates(config, recompute, n_tokens, estimator.n_ranks, estimator.on_cuda):
        try:
            changed = with_overrides(config, changes)
        except ConfigError:
            continue
        asked = changed.engine.activation_checkpointing
        estimate = estimator.estimate(changed, recompute if asked == "auto" else asked)
        if estimate.total_bytes <= budget:
            return Remedy(changes, estimate)
    return None


def candidates(
    config: StageConfig, recompute: Recompute, n_tokens: int, n_ranks: int, on_cuda: bool
) -> Iterator[tuple[str, ...]]:
    """Changes to try, in order: each alone, from the one that costs least, then more and more of them together.

    Args:
        n_tokens: of the heaviest pack.
    """
    smaller = tuple(_smaller_packs(n_tokens, config.batch.max_sample_tokens))
    others = tuple(_others(config, recompute, n_ranks, on_cuda))
    for change in (*smaller, *others):
        yield change
    together: tuple[str, ...] = smaller[-1] if smaller else ()
    for change in others:
        kept = tuple(one for one in together if one.split("=")[0] not in {new.split("=")[0] for new in change})
        together = (*kept, *change)
        yield together


def _smaller_packs(n_tokens: int, least: int) -> Iterator[tuple[str, ...]]:
    """Packs of half the tokens, of a quarter and so on, down to one sample."""
    while n_tokens > least:
        n_tokens = max(n_tokens // 2, least)
        yield (f"batch.max_tokens={n_tokens}",)


def _others(config: StageConfig, recompute: Recompute, n_ranks: int, on_cuda: bool) -> Iterator[tuple[str, ...]]:
    engine, language_model = config.engine, config.trainable.language_model
    for thriftier in RECOMPUTES[RECOMPUTES.index(recompute) + 1 :]:
        yield (f"engine.activation_checkpointing={thriftier}",)
    if engine.zero < 3 and n_ranks > 1:
        yield ("engine.zero=3",)
    if not engine.offload_optimizer and on_cuda:
        zero = max(engine.zero, 2)
        yield (
            ("engine.offload_optimizer=true",)
            if zero == engine.zero
            else (
                f"engine.zero={zero}",
                "engine.offload_optimizer=true",
            )
        )
    if language_model and language_model.lora is None:
        yield (LORA,)
    if language_model and on_cuda and not (language_model.lora and language_model.lora.quantize_base):
        nf4 = "trainable.language_model.lora.quantize_base=nf4"
        yield (nf4,) if language_model.lora else (LORA, nf4)
