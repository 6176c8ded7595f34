"""The data of a stage file as its run will see it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llava_train.config import StageConfig
from llava_train.data.chat import ChatEncoder
from llava_train.data.chat_templates import load_template
from llava_train.data.images import ImagePreprocessor
from llava_train.data.mixture import Mixture, open_mixture
from llava_train.data.packing import attention_cost_of
from llava_train.model.processor import build_processor


@dataclass(frozen=True)
class StageData:
    """The samples of a stage, and what turns them into tensors."""

    mixture: Mixture
    held_out: Mixture | None
    encoder: ChatEncoder
    preprocessor: ImagePreprocessor
    attention_cost: float
    """See `packing.sample_cost`."""


def open_stage_data(config: StageConfig) -> StageData:
    """Opens the data of a stage without loading its model. Raises UserError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are the parallelism
    mixture = open_mixture(config.data, config.seed, config.cache_dir)
    held_out = open_mixture(config.eval.data, config.seed, config.cache_dir) if config.eval else None
    front = build_processor(config.model, config.image)
    template = load_template(config.model.chat_template, front.tokenizer)
    batch = config.batch
    encoder = ChatEncoder(front.tokenizer, template, front.n_image_tokens, batch.max_sample_tokens, batch.over_long)
    preprocessor = ImagePreprocessor(front.processor.image_processor)
    return StageData(mixture, held_out, encoder, preprocessor, attention_cost_of(front.hidden_size))
