"""What the ranks of the tests share: `helpers` forks them from a process that has imported this.

Beside the imports it does what every run does and libraries remember: it builds a tiny model, estimates its memory, and
asks transformers how weights are renamed.
"""

import contextlib
import gc
import importlib
from pathlib import Path

import deepspeed.ops.op_builder.all_ops  # noqa: F401
import pandas  # noqa: F401  pyarrow imports it when it is first used
import pyarrow.compute  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import llava_train.cli
import llava_train.train.stage  # noqa: F401
from llava_train.model.trainable import set_trainable
from llava_train.train.memory import Estimator
from tests.tiny import stage, tiny_llava

LORA = {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}

config = stage(Path("nowhere"), trainable={"projector": {"lr": 1e-3}, "language_model": LORA})
llava = tiny_llava()  # transformers imports the classes of a model when they are asked for
get_checkpoint_conversion_mapping("llava")
Estimator(llava.model.config, 1, "cpu").estimate(config, "none")
set_trainable(llava.model, config.trainable, 0)
with contextlib.suppress(ImportError):  # an optimizer that ZeRO asks for, with a compiler: the longest import
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
del llava
gc.collect()
gc.freeze()  # so that no fork copies what it only looks at
