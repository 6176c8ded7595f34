"""README.md of an exported model: what it is, how to use it, how it was trained, what it reached.

What only the owner knows (the licence, intended uses) is left to the owner. Files are named, not placed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from transformers import LlavaConfig

from llava_train import __version__
from llava_train.config import SourceSection, StageConfig
from llava_train.files import is_hub_id
from llava_train.model.build import Llava
from llava_train.stage_file import RUN_CARD, ConfigError, load_run_about, load_run_card
from llava_train.use.prompts import Prompts

_FILE = re.compile(r"\.(jsonl?|gz|parquet|arrow)$")
_NATIVE_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Vision towers that vLLM's own LLaVA has."""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class _Stage:
    """A run that led to the model."""

    config: StageConfig
    about: dict[str, Any]
    metrics: dict[str, Any]
    """Of the last line of metrics.jsonl that has each."""

    @property
    def trains(self) -> str:
        lora = self.config.trainable.lora
        how = f", LoRA of rank {lora.rank} and alpha {lora.alpha:g}" if lora else ""
        rates = self.config.trainable.learning_rates().items()
        return "; ".join(f"{part} ({lr:g}{how if part == 'language_model' else ''})" for part, lr in rates)

    @property
    def data(self) -> Iterator[tuple[str, int | None]]:
        """Name and number of samples of each source."""
        noted = self.about.get("data") or []
        for number, source in enumerate(self.config.data):
            known = noted[number] if number < len(noted) else {}
            yield source.name or known.get("name") or Path(source.path).name, known.get("n_samples")


@dataclass(frozen=True)
class ModelCard:
    """What a card tells, gathered before the model is changed for export."""

    stages: list[_Stage]
    """From the first to the last; empty for a model that no run of ours made."""
    parts: dict[str, str | None]
    """Hub id, or name of the folder, of vision tower and language model."""
    origin: str
    config: LlavaConfig
    n_parameters: int
    stop_string: str | None

    @classmethod
    def of(cls, source: str, run_dir: Path | None, llava: Llava) -> ModelCard:
        """Gathers what is known of a model, from the folder of its run where there is one."""
        stages = list(_stages(run_dir))[::-1] if run_dir else []
        parts: dict[str, str | None] = {"vision_tower": None, "language_model": None}
        if stages:
            section = stages[-1].config.model
            parts = {name: _name_of(getattr(section, name)) for name in parts}
        n_parameters = sum(parameter.numel() for parameter in llava.model.parameters())
        origin = source if is_hub_id(source) else Path(source).name
        return cls(stages, parts, origin, llava.model.config, n_parameters, Prompts(llava).stop_string)

    @property
    def max_lora_rank(self) -> int | None:
        """What vLLM must be told: the rank of the adapter, or the next above that it knows."""
        lora = self.stages[-1].config.trainable.lora if self.stages else None
        return next((rank for rank in _VLLM_RANKS if lora and rank >= lora.rank), None)

    def write(self, folder: Path, name: str, has_adapter: bool) -> None:
        """Writes README.md.

        Args:
            name: of the model, such as `llava-1.5-7b-mine`.
            has_adapter: the language model is the base one, and the adapter stands beside it.
        """
        template = resources.files("llava_train.use").joinpath("model_card.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        body = environment.from_string(template).render(
            card=self,
            name=name,
            has_adapter=has_adapter,
            version=__version__,
            native=self.config.vision_config.model_type in _NATIVE_TOWERS
            and self.config.projector_hidden_act != "linear",
        )
        front = yaml.safe_dump(self._front(), sort_keys=False, allow_unicode=True)
        (folder / "README.md").write_text(f"---\n{front}---\n\n{body}", encoding="utf-8")

    def _front(self) -> dict[str, Any]:
        """What the hub reads: https://huggingface.co/docs/hub/model-cards."""
        sources = [source for stage in self.stages for source in stage.config.data]
        found = {
            "base_model": [name for name in [*self.parts.values(), self.origin] if name and is_hub_id(name)],
            "datasets": list(dict.fromkeys(source.path for source in sources if _is_hub_data(source))),
        }
        front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "other"}
        return {**front, **{key: value for key, value in found.items() if value}, "tags": ["llava", "llava_train"]}


def _stages(run_dir: Path) -> Iterator[_Stage]:
    """A run and those that it began with, the newest first, as far as their folders can be found."""
    seen: set[Path] = set()
    folder: Path | None = run_dir
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        try:
            stage = _Stage(load_run_card(folder), load_run_about(folder), _last_metrics(folder))
        except ConfigError:
            return
        yield stage
        folder = _folder_of(stage.config.init_from, folder)


def _folder_of(init_from: str | None, run_dir: Path) -> Path | None:
    """The run that a run began with: where it was, or beside the run, where runs were moved together."""
    if init_from in (None, "random"):
        return None
    places = (Path(str(init_from)), run_dir.absolute().parent / Path(str(init_from)).name)
    return next((place for place in places if (place / RUN_CARD).is_file()), None)


def _last_metrics(run_dir: Path) -> dict[str, Any]:
    """Step, loss and held-out loss where a run ended."""
    found: dict[str, Any] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        record = json.loads(line)
        found |= {key: record[key] for key in ("step", "loss", "eval_loss") if key in record}
    return found


def _name_of(part: Any) -> str:
    if not isinstance(part, str):
        return f"random {part.config.get('model_type')}"
    return part if is_hub_id(part) else Path(part).name


def _is_hub_data(source: SourceSection) -> bool:
    return is_hub_id(source.path) and not _FILE.search(source.path)
