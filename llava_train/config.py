"""Every key that a stage file may hold: its type, its default and what contradicts it.

`stage_file.load_stage` makes a `StageConfig` of a file. Nothing here touches a model, a GPU or the network.
"""

from __future__ import annotations

import difflib
import re
import typing
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from llava_train.contradictions import contradictions
from llava_train.refusals import shown
from llava_train.run_files import CACHE_FOLDER
from llava_train.user_paths import expand

Part = Literal["projector", "language_model", "vision_tower"]
PARTS: tuple[Part, ...] = typing.get_args(Part)

CHAT_TEMPLATES = (
    "plain",
    "vicuna_v1",
    "llava_v0",
    "llama2",
    "llama3",
    "mistral",
    "mistral_v3",
    "chatml",
    "phi3",
    "gemma",
    "zephyr",
)

NAME = r"^[\w][\w.\-]*$"
"""Names of runs."""

LearningRate = Annotated[float, Field(gt=0, description="Peak learning rate of AdamW.")]


class Section(BaseModel):
    """Base of all sections: keys that nobody reads are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RandomLanguageModel(Section):
    """A language model with random weights, for smoke runs."""

    config: dict[str, Any]
    """A transformers config, `model_type` included."""
    tokenizer: UserPath = "bytes"
    """`bytes` for a tokenizer of the 256 bytes, else a hub id or folder."""
    seed: int = 0
    """Seed of the weights; the same seed gives the same part in every stage."""


class RandomVisionTower(Section):
    """A vision tower with random weights, for smoke runs."""

    config: dict[str, Any]
    """A transformers config, `model_type` included."""
    seed: int = 0
    """Seed of the weights; the same seed gives the same part in every stage."""


UserPath = Annotated[str, AfterValidator(expand)]
"""A file, folder or hub id; `~` is replaced, a variable refused."""


def _known_template(name: str) -> str:
    known = (*CHAT_TEMPLATES, "auto")
    with suppress(OSError):  # a name that is too long
        if name in known or Path(name).is_file():
            return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{shown(name)} is neither a template ({', '.join(known)}) nor a jinja file{hint}")


ChatTemplate = Annotated[
    UserPath,
    AfterValidator(_known_template),
    Field(json_schema_extra={"anyOf": [{"enum": [*CHAT_TEMPLATES, "auto"]}, {"type": "string"}]}),
]


class ModelSection(Section):
    """The parts, and how they are joined."""

    language_model: UserPath | RandomLanguageModel
    """Hub id or folder of a causal language model."""
    vision_tower: UserPath | RandomVisionTower
    """Hub id or folder of a CLIP, SigLIP, SigLIP 2 or DINOv2 encoder."""
    vision_feature_layer: int | Annotated[list[int], Field(min_length=1)] = -2
    """Index into the encoder's hidden states; -2 is the layer before the last. Of a list, the features are joined."""
    vision_feature_select: Literal["patch", "full"] = "patch"
    """`patch` drops the class token, `full` keeps every token of the encoder."""
    projector: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
    """`mlp2x_gelu` as LLaVA-1.5, `linear` as LLaVA v1."""
    chat_template: ChatTemplate
    """The text around the turns, which the exported model carries: a name, `auto` for the one that the language model
    was trained with, or a jinja file with generation marks."""


class LoraSection(Section):
    """LoRA adapters (peft) on every linear layer of the language model."""

    rank: PositiveInt
    """Inner width of an adapter."""
    alpha: Annotated[float, Field(gt=0)]
    """An adapter's output is multiplied by `alpha / rank`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that a training step leaves out."""
    quantize_base: Literal["nf4"] | None = None
    """Keep the language model's own weights in 4 bits while its adapters train (QLoRA, 2305.14314); needs bitsandbytes.
    The result has them in bf16, as 4 bits rounded them."""


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
    """Adapters train, the weights themselves are frozen; default: they train in full."""


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


def _allow_words(schema: dict[str, Any]) -> None:
    """Editors shall know the short forms too."""
    words = {"type": "string", "pattern": r"^(all|(first|repeat) \d+|fraction [\d.]+)$"}
    schema["anyOf"] = [words, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": schema.pop("type")}]


def _number_in(value: Any) -> int | float | None:
    """The number that somebody may have meant by a value such as `1000`, `"1,000"` or `50%`."""
    if isinstance(value, str) and (found := re.search(r"\d[\d,_]*(\.\d+)?", value)):
        number = found[0].replace(",", "").replace("_", "")
        return float(number) if "." in number else int(number)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12
    return value if is_number else None


class Take(Section):
    """How much of a source an epoch has: `all`, `first N`, a share such as `0.5`, or `repeat R`."""

    model_config = ConfigDict(json_schema_extra=_allow_words)

    first: PositiveInt | None = None
    """The first so many samples."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """A random share, the same in every epoch; `seed` decides which."""
    repeat: PositiveInt = 1
    """Every sample so many times an epoch."""

    @model_validator(mode="before")
    @classmethod
    def _from_words(cls, value: Any) -> Any:
        if value == "all":
            return {}
        if isinstance(value, dict | Take):
            return value
        if isinstance(value, str) and (words := re.fullmatch(r"(first|repeat) (\d+)|(fraction) ([\d.]+)", value)):
            how, number = filter(None, words.groups())
            return {how: number}
        number = _number_in(value)
        if isinstance(value, int | float) and number is not None and 0 < number <= 1:
            return {"fraction": value}
        first = f"first {number}" if isinstance(number, int) and number > 1 else "first 1000"
        is_percent = isinstance(value, str) and value.endswith("%") and number is not None and 0 < number <= 100
        share = f"{number / 100:g}" if is_percent and number else "0.5"
        raise ValueError(f"{shown(value)} is not understood; write all, {first}, a share such as {share}, or repeat 3")

    @model_validator(mode="after")
    def _one_way(self) -> Take:
        if (self.first is not None) + (self.fraction is not None) + (self.repeat > 1) > 1:
            raise ValueError("one of first, fraction and repeat, not several")
        return self


class SourceSection(Section):
    """One source of samples."""

    path: UserPath
    """LLaVA JSON or JSONL (also gzipped), Parquet, a saved data set, or the id of one on the Hugging Face hub."""
    images: UserPath | Annotated[dict[str, UserPath], Field(min_length=1)] | None = None
    """Folder, ZIP or TAR that the image paths are relative to, or such by prefix; default: the folder of `path`."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What metrics and reports call it; default: from `path`."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set; default: `train`."""
    take: Take = Take()
    """How much of it an epoch has: `all`, `first 1000`, a share such as `0.5`, or `repeat 3`."""


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
    """Passes over the data; 0.5 stops half-way."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, when that is earlier than `epochs`."""
    lr: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up: along a cosine or a line to 0 at the last step, or no change."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient; null switches clipping off."""


def _from_truth_value(value: Any) -> Any:
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


Checkpointing = Annotated[Literal["none", "selective", "full", "auto"], BeforeValidator(_from_truth_value)]


class EngineSection(Section):
    """DeepSpeed: how the run is spread over devices."""

    zero: Literal[0, 1, 2, 3] = 2
    """Of what trains, the ranks share the optimizer (1), the gradients too (2), the weights of all parts too (3)."""
    offload_optimizer: bool = False
    """The optimizer lives in the host's memory and steps on the CPU."""
    offload_parameters: bool = False
    """Weights live in the host's memory and travel to the GPU for each layer; under `zero: 3`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; in bf16 the optimizer keeps float32 weights."""
    activation_checkpointing: Checkpointing = "auto"
    """Activations kept for the backward pass: `none` computes none again, `selective` all but matrix products and
    attention, `full` whole layers; `auto` takes the first of them that fits the memory, by an estimate."""
    kernels: Literal["eager", "compile", "liger"] = "eager"
    """What computes a layer beside matrix products and attention: PyTorch as it is, `torch.compile` of each layer, or
    the kernels of liger-kernel. One of them: they do not add up."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """The run ends, and names the rank, when no rank has gone on for so long."""
    deepspeed: UserPath | dict[str, Any] | None = None
    """A DeepSpeed JSON file (or its keys) for whatever this stage file does not own."""


class CheckpointSection(Section):
    """How often a run is saved."""

    every: PositiveInt | None = 500
    """Optimizer steps between checkpoints, the last step has one too; null saves none but the result."""
    keep: PositiveInt = 2
    """Complete checkpoints to keep."""


class WandbSection(Section):
    """Weights & Biases."""

    project: str
    """Project of the run; it is made where it is missing."""
    entity: str | None = None
    """User or team; default: that of your login."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes to the run's folder, for `wandb sync`."""


class LoggingSection(Section):
    """What is written down of a run, and where to."""

    every: PositiveInt = 10
    """Optimizer steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write `tensorboard/` in the run's folder, too."""
    wandb: WandbSection | None = None
    """Send the run to Weights & Biases, too."""


TextMetric = Literal["vqa", "exact", "pope", "anls", "caption"]
"""What generated answers are measured by; `use.metrics` tells what each is."""


class QuestionsSection(Section):
    """A file of questions, as `llava-train evaluate` takes it."""

    path: UserPath
    """LLaVA's JSONL of questions with references, or training data."""
    images: UserPath | None = None
    """Folder or archive that the image paths are relative to; default: the folder of `path`."""


class EvalSection(Section):
    """Held-out loss, a few generated answers, and what they are worth, while training."""

    every: PositiveInt
    """Optimizer steps between evaluations; the last step has one too."""
    data: Annotated[list[SourceSection], Field(min_length=1)]
    """Held-out samples, which are not trained on."""
    max_samples: PositiveInt = 256
    """The held-out loss is over the first so many samples, rounded up to whole batches."""
    generate: Annotated[int, Field(ge=0)] = 4
    """Number of held-out prompts to answer."""
    max_new_tokens: PositiveInt = 64
    """Most tokens of an answer."""
    metric: TextMetric | None = None
    """A score of generated answers: `eval_METRIC` in metrics.jsonl."""
    questions: QuestionsSection | None = None
    """What the score is over; default: the first question of each sample of `data`, its answer being the reference."""
    metric_samples: PositiveInt = 64
    """The score is over the first so many questions."""


class LoaderSection(Section):
    """How samples are read."""

    workers: Annotated[int, Field(ge=0)] = 4
    """Processes a rank that read ahead; 0 reads in the training process."""
    cache_features: bool = False
    """Compute what a frozen vision tower makes of each picture once, keep it below `output`/.cache, and read it from
    there. Worth its disk space for small language models and several epochs."""


class StageConfig(Section):
    """One stage of training."""

    name: Annotated[str, Field(pattern=NAME)]
    """The run's folder below `output`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of samples, of what `take` draws, of new weights and of dropout."""
    model: ModelSection
    init_from: UserPath | None = None
    """Whose trained parts this stage starts from: a run, by its name or folder; a LLaVA model of transformers or of the
    original (full, or LoRA), folder or hub id; `mm_projector.bin` or its folder; `random` for a new projector. Looked
    up in this order: a run of that name in `output`, a path, a hub id."""
    trainable: TrainableSection
    data: Annotated[list[SourceSection], Field(min_length=1)]
    """What is trained on: one order runs over all sources."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A sample that cannot be read: stop, or give it zero weight and a line in quarantine.jsonl."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Stop, with a summary, when more than this share of the samples so far was left out (by `skip`, or `drop`)."""
    max_bad_steps: PositiveInt = 3
    """Stop after so many steps in a row whose loss or gradient is not finite. Each of them is skipped."""
    image: ImageSection = ImageSection()
    batch: BatchSection
    schedule: ScheduleSection = ScheduleSection()
    engine: EngineSection = EngineSection()
    loader: LoaderSection = LoaderSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    eval: EvalSection | None = None
    output: UserPath = "runs"
    """Folder of run folders."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name

    @property
    def start(self) -> str | None:
        """What `init_from` names: None for a new projector, the folder of a run in `output`, a path, or a hub id."""
        if self.init_from is None or self.init_from == "random":
            return None
        folder = Path(self.output) / self.init_from
        is_run = self.init_from != self.name and re.fullmatch(NAME, self.init_from) and folder.is_dir()
        return str(folder) if is_run else self.init_from

    @property
    def cache_dir(self) -> Path:
        """What is read from data files once and for all runs; it may be deleted between runs."""
        return Path(self.output) / CACHE_FOLDER

    @model_validator(mode="after")
    def _contradictions(self) -> StageConfig:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
