"""Every key that a stage file may hold: its type, its default and what contradicts it.

A stage file is YAML and describes one stage on its own. `load_stage` reads it, applies `--set` overrides
and returns a `StageConfig`, or raises `ConfigError` with the file, the key, what is allowed and the nearest
valid name. Nothing here touches a model, a GPU or the network, and no other module reads YAML.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from llava_train.errors import UserError

Part = Literal["projector", "language_model", "vision_tower"]
PARTS: tuple[Part, ...] = typing.get_args(Part)

LearningRate = Annotated[float, Field(gt=0, description="peak learning rate of AdamW")]


class ConfigError(UserError):
    """A stage file says something that cannot be run. The message names the file, the key and the mend."""


class Section(BaseModel):
    """Base of all sections: keys that nobody reads are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RandomLanguageModel(Section):
    """A language model with random weights, for smoke runs."""

    config: dict[str, Any]
    """A transformers config, `model_type` included."""
    tokenizer: str = "bytes"
    """`bytes` for a tokenizer of the 256 bytes, else a hub id or folder."""
    seed: int = 0
    """Seed of the weights; the same seed gives the same part in every stage."""


class RandomVisionTower(Section):
    """A vision tower with random weights, for smoke runs."""

    config: dict[str, Any]
    """A transformers config, `model_type` included."""
    seed: int = 0
    """Seed of the weights; the same seed gives the same part in every stage."""


class ModelSection(Section):
    """The parts, and how they are joined."""

    language_model: str | RandomLanguageModel
    """Hub id or folder of a causal language model."""
    vision_tower: str | RandomVisionTower
    """Hub id or folder of a CLIP, SigLIP, SigLIP 2 or DINOv2 encoder."""
    vision_feature_layer: int | Annotated[list[int], Field(min_length=1)] = -2
    """Index into the encoder's hidden states; -2 is the layer before the last. Of a list, the features are joined."""
    vision_feature_select: Literal["patch", "full"] = "patch"
    """`patch` drops the class token, `full` keeps every token of the encoder."""
    projector: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """`mlp2x_gelu` as LLaVA-1.5, `linear` as LLaVA v1."""
    chat_template: Literal["plain", "vicuna_v1", "chatml"]
    """The text around the turns; the exported model carries it."""


class LoraSection(Section):
    """LoRA adapters (peft) on every linear layer of the language model."""

    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class PartTraining(Section):
    """How a part trains."""

    lr: LearningRate


class ProjectorTraining(PartTraining):
    """How the projector trains."""

    standardize: bool = False
    """Train on features shifted to mean 0 and scaled to deviation 1; the result is a plain projector all the same."""


class LanguageModelTraining(PartTraining):
    """How the language model trains: in full, or through LoRA adapters."""

    lora: LoraSection | None = None


class TrainableSection(Section):
    """The parts that train. A part that is not listed is frozen."""

    projector: ProjectorTraining | None = None
    language_model: LanguageModelTraining | None = None
    vision_tower: PartTraining | None = None

    def learning_rates(self) -> dict[Part, float]:
        """Peak learning rate of each part that trains."""
        parts: dict[Part, PartTraining | None] = {part: getattr(self, part) for part in PARTS}
        return {part: training.lr for part, training in parts.items() if training is not None}

    @property
    def lora(self) -> LoraSection | None:
        return self.language_model.lora if self.language_model else None


class SourceSection(Section):
    """One file of samples."""

    path: str
    """LLaVA JSON or JSONL."""
    images: str | None = None
    """Folder that the samples' image paths are relative to; default: the folder of `path`."""


class ImageSection(Section):
    """How a picture becomes the square that the encoder sees."""

    aspect: Literal["pad", "crop", "resize"] = "pad"
    """`pad` to a square with the encoder's mean colour, centre `crop`, or `resize` without keeping the ratio."""
    size: PositiveInt | None = None
    """Side in pixels; default: the encoder's own. Another size needs an encoder that interpolates (DINOv2)."""


class BatchSection(Section):
    """What one optimizer step trains on, and the limits of packing."""

    size: PositiveInt
    """Samples a step, over all ranks and micro-steps."""
    max_tokens: PositiveInt
    """Most tokens in a pack: the memory knob. It changes no result."""
    max_sample_tokens: PositiveInt = 2048
    """Most tokens of one sample, image tokens included."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sample over `max_sample_tokens`: stop, drop it with a line in quarantine.jsonl, or cut it."""
    packing: bool = True
    """False puts each sample in a micro-step of its own (to compare)."""


class ScheduleSection(Section):
    """How long, and how the learning rate goes."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, when that is earlier than `epochs`."""
    lr: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null switches clipping off."""


class EngineSection(Section):
    """DeepSpeed: how the run is spread over devices."""

    zero: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    deepspeed: str | dict[str, Any] | None = None
    """A DeepSpeed JSON file (or its keys) for whatever this stage file does not own."""


class CheckpointSection(Section):
    every: PositiveInt | None = 500
    """Optimizer steps between checkpoints, the last step has one too; null saves none but the result."""
    keep: PositiveInt = 2
    """Complete checkpoints to keep."""


class WandbSection(Section):
    project: str
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class LoggingSection(Section):
    every: PositiveInt = 10
    """Optimizer steps between lines of metrics.jsonl."""
    wandb: WandbSection | None = None


class EvalSection(Section):
    """Held-out loss and a few generated answers while training."""

    every: PositiveInt
    data: Annotated[list[SourceSection], Field(min_length=1)]
    max_samples: PositiveInt = 256
    """The held-out loss is over the first so many samples, rounded up to whole batches."""
    generate: Annotated[int, Field(ge=0)] = 4
    """Number of held-out prompts to answer."""
    max_new_tokens: PositiveInt = 64


class LoaderSection(Section):
    workers: Annotated[int, Field(ge=0)] = 4
    """Processes a rank that read ahead; 0 reads in the training process."""


class StageConfig(Section):
    """One stage of training."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.\-]*$")]
    """The run's folder below `output`."""
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection
    init_from: str | None = None
    """Run folder (or LLaVA model) whose trained parts this stage starts from; `random` for a new projector."""
    trainable: TrainableSection
    data: Annotated[list[SourceSection], Field(min_length=1)]
    on_bad_sample: Literal["error", "skip"] = "error"
    """A sample that cannot be read: stop, or give it zero weight and a line in quarantine.jsonl."""
    image: ImageSection = ImageSection()
    batch: BatchSection
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    loader: LoaderSection = LoaderSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    eval: EvalSection | None = None
    output: str = "runs"

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name

    @model_validator(mode="after")
    def _contradictions(self) -> StageConfig:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _contradictions(config: StageConfig) -> typing.Iterator[str]:
    """Yields `key: what is wrong and what to do` for each pair of keys that cannot both be meant."""
    rates, engine, batch = config.trainable.learning_rates(), config.engine, config.batch
    if not rates:
        yield f"trainable: every part is frozen, nothing would train; list at least one of {', '.join(PARTS)}"
    if rates.keys() - {"projector"} and config.init_from is None:
        yield (
            "init_from: missing, but the stage trains more than the projector; name the run folder of the stage "
            "that trained the projector, or `random` to start from a new projector on purpose"
        )
    if batch.max_tokens < batch.max_sample_tokens:
        yield (
            f"batch.max_tokens: {batch.max_tokens} is below batch.max_sample_tokens ({batch.max_sample_tokens}), "
            "so the longest sample fits no pack; raise the first or lower the second"
        )
    if engine.offload_parameters and engine.zero != 3:
        yield f"engine.offload_parameters: needs engine.zero: 3, not {engine.zero}"
    if engine.offload_optimizer and engine.zero == 0:
        yield "engine.offload_optimizer: needs engine.zero: 1, 2 or 3, not 0"
    if config.eval and config.model.chat_template == "plain" and config.trainable.language_model:
        yield "model.chat_template: plain has no prompt to answer; a language model trains on a chat template"
    yield from deepspeed_conflicts(config)


def deepspeed_conflicts(config: StageConfig) -> typing.Iterator[str]:
    """Yields a line for each key of the user's DeepSpeed JSON that the stage file owns with another value."""
    try:
        user = user_deepspeed(config.engine)
    except (OSError, ValueError) as error:
        yield f"engine.deepspeed: cannot read {config.engine.deepspeed}: {error}"
        return
    offload = {True: "cpu", False: "none"}
    owned: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("batch.size", config.batch.size),
        "train_micro_batch_size_per_gpu": ("batch.max_tokens", None),
        "gradient_accumulation_steps": ("batch.max_tokens", None),
        "gradient_clipping": ("schedule.clip", config.schedule.clip or 0.0),
        "optimizer": ("trainable.*.lr", None),
        "scheduler": ("schedule.lr", None),
        "bf16.enabled": ("engine.precision", config.engine.precision == "bf16"),
        "fp16.enabled": ("engine.precision", False),
        "zero_optimization.stage": ("engine.zero", config.engine.zero),
        "zero_optimization.offload_optimizer.device": (
            "engine.offload_optimizer",
            offload[config.engine.offload_optimizer],
        ),
        "zero_optimization.offload_param.device": (
            "engine.offload_parameters",
            offload[config.engine.offload_parameters],
        ),
        "activation_checkpointing": ("engine.activation_checkpointing", None),
    }
    for key, (ours, value) in owned.items():
        theirs: Any = user
        for name in key.split("."):
            theirs = theirs.get(name) if isinstance(theirs, dict) else None
        if theirs not in (None, "auto", value):
            yield (
                f"engine.deepspeed: its key {key} ({json.dumps(theirs)}) conflicts with {ours} of the stage file"
                f"{'' if value is None else f' ({json.dumps(value)})'}; remove it from the DeepSpeed JSON "
                f"and set {ours}"
            )


def user_deepspeed(engine: EngineSection) -> dict[str, Any]:
    """The DeepSpeed keys that the user gave, as a dict. Raises OSError or ValueError."""
    if engine.deepspeed is None or isinstance(engine.deepspeed, dict):
        return dict(engine.deepspeed or {})
    content = json.loads(Path(engine.deepspeed).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def load_stage(path: str | Path, overrides: typing.Sequence[str] = ()) -> StageConfig:
    """Reads a stage file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` strings; the value is YAML, an integer in the key indexes a list.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or contradiction.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the stage file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a stage file is a mapping of keys, such as `name: my-stage`")
    for override in overrides:
        _apply_override(content, override)
    return parse_stage(content, str(path))


def parse_stage(content: dict[str, Any], origin: str) -> StageConfig:
    """Validates the content of a stage file. `origin` names it in errors. Raises ConfigError."""
    try:
        return StageConfig.model_validate(content)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(problem).splitlines()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in dict.fromkeys(lines))) from None


def dump_stage(config: StageConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def stage_schema() -> dict[str, Any]:
    """JSON Schema of a stage file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **StageConfig.model_json_schema()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML 1.1 lets a later key replace an earlier one in silence. Not here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is a name, not a list or mapping{key_node.start_mark}")
            if key_node.value in seen:
                raise yaml.YAMLError(f"key {key_node.value!r} stands twice{key_node.start_mark}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one `a.b=value` in place; sections that the file leaves out are made."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as key=value, for example --set batch.size=64")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = content
    for name in parents:
        if isinstance(node, list):
            node = node[_list_index(node, name, override)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {name} holds {node!r}, which has no keys")
    if isinstance(node, list):
        node[_list_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _list_index(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise ConfigError(f"--set {override}: {name} is not an index of a list of {len(items)}")
    return int(name)


def _explain(problem: Any) -> str:
    """One validation problem in the words of a user: `key: what is wrong; allowed: ...; did you mean ...?`."""
    location = [step for step in problem["loc"] if not _is_union_tag(step)]
    key = ".".join(map(str, location))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = sorted(_keys_at(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        if location[-1] == "lora":
            hint = "LoRA goes below trainable.language_model, beside its lr; "
        return f"{key}: unknown key; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: required, but missing"
    if kind == "value_error":
        message = str(context.get("error", problem["msg"]))
        return f"{key}: {message}" if key else message
    if kind == "literal_error":
        near = difflib.get_close_matches(str(problem["input"]), _plain(context["expected"]), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: {problem['input']!r} is not allowed; allowed: {context['expected']}{hint}"
    return f"{key}: {problem['msg']}, not {problem['input']!r}"


def _plain(expected: str) -> list[str]:
    return [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]


def _is_union_tag(step: Any) -> bool:
    """pydantic adds the name of the tried alternative to a location; users don't write that."""
    alternatives = ("str", "int", "RandomLanguageModel", "RandomVisionTower")
    return step in alternatives or str(step).startswith(("dict[", "list["))


def _keys_at(location: list[Any]) -> set[str]:
    """Names of the keys that are allowed below a location, over all alternatives of its type."""
    models: list[type[BaseModel]] = [StageConfig]
    for step in location:
        if isinstance(step, int):
            continue
        fields = [model.model_fields[step].annotation for model in models if step in model.model_fields]
        models = [model for annotation in fields for model in _models_in(annotation)]
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
