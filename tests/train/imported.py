"""What the ranks of the tests share: `helpers` forks them from a process that has imported this."""

import contextlib
import gc
import importlib

import deepspeed.ops.op_builder.all_ops  # noqa: F401

import llava_train.cli
import llava_train.train.stage  # noqa: F401
from tests.tiny import tiny_llava

tiny_llava()  # transformers imports the classes of a model when they are asked for
with contextlib.suppress(ImportError):  # an optimizer that ZeRO asks for, with a compiler: the longest import
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
gc.collect()
gc.freeze()  # so that no fork copies what it only looks at
