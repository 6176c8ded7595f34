"""What libraries say while they work, turned down so that what a person must read is seen. `--verbose` turns it up.

Silenced, and why; whatever is not listed here shows:

- bars over weights that are read or written, and over data sets that are prepared: seconds of work, broken lines in a
  log. Downloads keep their bars on a terminal, where they take minutes.
- FutureWarnings of the libraries below: they tell who wrote this package what will change, its tests see them.
- DeepSpeed's word that there is no GPU: the table at a run's start names the devices.
- bitsandbytes' that it lacks a kernel for CPUs: peft imports it in runs that quantize nothing, too.
- on ranks but the first, warnings of any kind: the first says the same. Errors show on every rank.

Warnings of ours, other warnings of libraries (a UserWarning of torch, a WARNING in the log of transformers) and errors
stay. Python's own `-W` and PYTHONWARNINGS win.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

from llava_train.errors import Note

_NO_BARS = "TQDM_DISABLE"
"""Read when tqdm is imported; huggingface_hub overrides it for downloads on a terminal."""
_TALK_OF_THE_FUTURE = ("accelerate", "datasets", "deepspeed", "huggingface_hub", "peft", "torch", "transformers")
_DEEPSPEED = "DeepSpeed"
"""The name of its log, whose level its import sets."""
_NO_NEWS = {
    _DEEPSPEED: "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Beginnings of what is not said, by the name of the log."""


def turn_down(is_main: bool = True) -> None:
    """Call it before torch, transformers and DeepSpeed are imported."""
    os.environ.setdefault(_NO_BARS, "1")
    for log in _NO_NEWS:
        logging.getLogger(log).addFilter(_is_news)
    warnings.formatwarning = _formatted
    if not is_main:
        logging.disable(logging.WARNING)
    if sys.warnoptions:
        return
    if is_main:
        for library in _TALK_OF_THE_FUTURE:
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")
    else:
        warnings.simplefilter("ignore")


def turn_up() -> None:
    """Lets DeepSpeed tell what it does. Call it after the imports."""
    log = logging.getLogger(_DEEPSPEED)
    log.setLevel(logging.INFO)
    for handler in log.handlers:
        handler.setLevel(logging.INFO)


_of_python = warnings.formatwarning


def _formatted(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
    """The text of a warning: a note of ours as one line, without the line of code that it comes from."""
    if issubclass(category, Note):
        return f"note: {message}\n"
    return _of_python(message, category, *place, **more)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS[record.name])
