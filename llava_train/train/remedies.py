"""What to change in a stage file so that it fits the memory: of some changes the first that is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llava_train.config import StageConfig
from llava_train.model.recompute import RECOMPUTES, Recompute
from llava_train.stage_file import ConfigError, with_overrides
from llava_train.train.memory import Estimate, Estimator, gib

Knob = Callable[[StageConfig], tuple[str, ...]]
"""What to change in a stage, as `key=value` for `--set`; nothing where it stands so already, or does not apply."""

_LORA = "trainable.language_model.lora={rank: 128, alpha: 256, dropout: 0.05}"
"""As LLaVA-1.5 has it."""
_LORA_LR = 10
"""Times the learning rate of a full fine-tune, as LLaVA-1.5 has it."""


@dataclass(frozen=True)
class Remedy:
    """Changes that make a stage fit."""

    changes: tuple[str, ...]
    """`key=value`, as for `--set`."""
    estimate: Estimate

    def __str__(self) -> str:
        keys = " ".join(f"'{change}'" if " " in change else change for change in self.changes)
        note = "; adapters train then, in place of the model's weights" if _LORA in self.changes else ""
        return f"--set {keys} (then {gib(self.estimate.total_bytes)}{note})"


def find_remedy(estimator: Estimator, config: StageConfig, recompute: Recompute, budget: int) -> Remedy | None:
    """The first changes after which a stage takes at most `budget` bytes on a device, None if none do.

    None of the changes can be left out.

    Args:
        recompute: what the stage does now, whatever it says.
    """

    def tried(knobs: Sequence[Knob]) -> Remedy | None:
        try:
            changes, changed = turned(config, knobs)
        except ConfigError:
            return None
        asked = changed.engine.activation_checkpointing
        estimate = estimator.estimate(changed, recompute if asked == "auto" else asked)
        return Remedy(changes, estimate) if estimate.total_bytes <= budget else None

    n_tokens = estimator.pack(config).n_tokens
    for knobs in candidates(config, recompute, n_tokens, estimator.n_ranks, estimator.on_cuda):
        if found := tried(knobs):
            for knob in reversed(knobs):
                without = tuple(other for other in knobs if other is not knob)
                if shorter := tried(without):
                    knobs, found = without, shorter
            return found
    return None


def turned(config: StageConfig, knobs: Sequence[Knob]) -> tuple[tuple[str, ...], StageConfig]:
    """What some knobs, one after the other, change in a stage, and the stage then. Raises ConfigError."""
    changes: dict[str, str] = {}
    for knob in knobs:
        new = knob(config)
        config = with_overrides(config, new)
        changes |= {change.split("=")[0]: change for change in new}
    return tuple(changes.values()), config


def candidates(
    config: StageConfig, recompute: Recompute, n_tokens: int, n_ranks: int, on_cuda: bool
) -> Iterator[tuple[Knob, ...]]:
    """Knobs to try, in order: each alone, from the one that costs least, then more and more of them together.

    Args:
        n_tokens: of the heaviest pack.
    """
    smaller = tuple(_smaller_packs(n_tokens, config.batch.max_sample_tokens))
    others: tuple[Knob, ...] = tuple(_checkpointing(way) for way in RECOMPUTES[RECOMPUTES.index(recompute) + 1 :])
    if n_ranks > 1:
        others += (_zero3,)
    if on_cuda:
        others += (_offload_optimizer, _offload_parameters)
    others += (_lora,)
    if on_cuda:
        others += (_nf4,)
    for knob in (*smaller, *others):
        if knob(config) and _is_allowed(config, (knob,)):
            yield (knob,)
    if on_cuda and _lora(config):
        yield _lora, _nf4
    together = smaller[-1:]
    for knob in others:
        if _is_allowed(config, (*together, knob)):
            together = (*together, knob)
            yield together


def _is_allowed(config: StageConfig, knobs: Sequence[Knob]) -> bool:
    try:
        turned(config, knobs)
    except ConfigError:  # the user's own DeepSpeed keys say otherwise
        return False
    return True


def _smaller_packs(n_tokens: int, least: int) -> Iterator[Knob]:
    """Packs of half the tokens, of a quarter and so on, down to one sample."""
    while n_tokens > least:
        n_tokens = max(n_tokens // 2, least)
        yield _packs_of(n_tokens)


def _packs_of(n_tokens: int) -> Knob:
    return lambda config: (f"batch.max_tokens={n_tokens}",)


def _checkpointing(way: Recompute) -> Knob:
    def knob(config: StageConfig) -> tuple[str, ...]:
        sees_nothing = way == "selective" and config.engine.kernels == "compile"
        return () if sees_nothing else (f"engine.activation_checkpointing={way}",)

    return knob


def _zero3(config: StageConfig) -> tuple[str, ...]:
    return ("engine.zero=3",) if config.engine.zero < 3 else ()


def _offload_optimizer(config: StageConfig) -> tuple[str, ...]:
    if config.engine.offload_optimizer:
        return ()
    return _at_zero(config, max(config.engine.zero, 2)) + ("engine.offload_optimizer=true",)


def _offload_parameters(config: StageConfig) -> tuple[str, ...]:
    return () if config.engine.offload_parameters else (*_at_zero(config, 3), "engine.offload_parameters=true")


def _lora(config: StageConfig) -> tuple[str, ...]:
    language_model = config.trainable.language_model
    if language_model is None or language_model.lora:
        return ()
    return _LORA, f"trainable.language_model.lr={_LORA_LR * language_model.lr:g}"


def _nf4(config: StageConfig) -> tuple[str, ...]:
    """With the keys that 4-bit weights cannot stand beside, see `contradictions`."""
    lora = config.trainable.lora
    if lora is None or lora.quantize_base:
        return ()
    kept_here = ("engine.offload_parameters=false",) if config.engine.offload_parameters else ()
    bf16 = ("engine.precision=bf16",) if config.engine.precision != "bf16" else ()
    zero = _at_zero(config, min(config.engine.zero, 2))
    return ("trainable.language_model.lora.quantize_base=nf4", *zero, *kept_here, *bf16)


def _at_zero(config: StageConfig, zero: int) -> tuple[str, ...]:
    return () if config.engine.zero == zero else (f"engine.zero={zero}",)
